#!/bin/sh
# Send prompts from this machine to a watched folder on another one, and fetch what became of them. For cron:
#
#   * * * * *  cron-rsync.sh "$HOME/pictures" server:/srv/imagewatch
#
# Write prompts and their images into LOCAL/outgoing. Pictures and receipts come to LOCAL/outbox, failures to LOCAL/errors.
# It may run as often as it likes: rsync -a keeps the times of files, by which a prompt that is over is recognised and not
# paid for again. To make a picture once more, save its prompt again.
set -eu

local=$1 remote=$2
mkdir -p "$local/outgoing" "$local/outbox" "$local/errors"
exec 9>"$local/.lock"
flock -n 9 || exit 0 # the one before is still at it

# Images first, prompts last. rsync writes hidden files and renames them, as the protocol asks; never use --inplace.
rsync -a --exclude='.*' --exclude='*~' --exclude='*.prompt.txt' "$local/outgoing/" "$remote/inbox/"
rsync -a --exclude='.*' --include='*/' --include='*.prompt.txt' --exclude='*' "$local/outgoing/" "$remote/inbox/"

# A receipt is the end of a job: it may not be seen here before its pictures. So what is over is noted first, then
# everything else is fetched, and then the receipts that were noted are shown.
for door in outbox errors; do
    noted=$local/.$door
    mkdir -p "$noted"
    rsync -a --compare-dest="../$door" --exclude='.*' --include='*/' --include='*.receipt.toml' \
        --include='*.error.toml' --exclude='*' "$remote/$door/" "$noted/"
    rsync -a --exclude='.*' --exclude='*.receipt.toml' --exclude='*.error.toml' "$remote/$door/" "$local/$door/"
    rsync -a --remove-source-files "$noted/" "$local/$door/"
done
