#!/bin/sh
# Send prompts from this machine to a watched folder on another one, and fetch the results. For cron:
#
#   * * * * *  cron-rsync.sh "$HOME/pictures" server:/srv/imagewatch
#
# Write prompts and their images into LOCAL/outgoing. Images and receipts appear in LOCAL/outbox, failures in LOCAL/errors.
# You may run it as often as you like: rsync -a keeps the times of files, so imagewatch recognizes a finished prompt and
# does not send it again. To create an image once more, save its prompt again.
set -eu

local=$1 remote=$2
mkdir -p "$local/outgoing" "$local/outbox" "$local/errors"
exec 9>"$local/.lock"
flock -n 9 || exit 0 # the previous run is not finished

# Images first, prompts last. rsync writes hidden files and renames them, as the protocol asks; never use --inplace.
rsync -a --exclude='.*' --exclude='*~' --exclude='*.prompt.txt' "$local/outgoing/" "$remote/inbox/"
rsync -a --exclude='.*' --include='*/' --include='*.prompt.txt' --exclude='*' "$local/outgoing/" "$remote/inbox/"

# A receipt means that the job is finished, so it must not appear here before its images. Therefore the finished jobs
# are noted first, then all other files are fetched, and then the noted receipts are moved into place.
for folder in outbox errors; do
    noted=$local/.$folder
    mkdir -p "$noted"
    rsync -a --compare-dest="../$folder" --exclude='.*' --include='*/' --include='*.receipt.toml' \
        --include='*.error.toml' --exclude='*' "$remote/$folder/" "$noted/"
    rsync -a --exclude='.*' --exclude='*.receipt.toml' --exclude='*.error.toml' "$remote/$folder/" "$local/$folder/"
    rsync -a --remove-source-files "$noted/" "$local/$folder/"
done
