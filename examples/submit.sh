#!/bin/sh
# Drop a prompt, wait for the result, print the paths of the images. The folder protocol in shell; needs no imagewatch.
#
#   submit.sh ROOT "PROMPT" [IMAGE]…
#
# ROOT contains inbox, outbox and errors. Exits with code 0 if there is an image, with 1 if there is an error file,
# and with 64 if nothing was dropped.
set -eu

root=$1 text=$2
shift 2
name=$(date -u +%Y%m%d-%H%M%S)-$$ # a unique name

for image in "$@"; do
    case ${image##*/} in # without the folder, whose name may contain a dot, too
    ?*.?*) ;;
    *)
        echo "$image: its name must end in .png, .jpg, .jpeg or .webp" >&2
        exit 64
        ;;
    esac
done

# 1. The images: first under a hidden name, then by rename. 2. The prompt, which names them, last, in the same way.
names=
number=0
for image in "$@"; do
    number=$((number + 1))
    final=$name.in$number.${image##*.}
    cp -- "$image" "$root/inbox/.$name.tmp"
    mv -- "$root/inbox/.$name.tmp" "$root/inbox/$final"
    names="$names\"$final\", "
done
printf '+++\ninput_images = [%s]\n+++\n%s\n' "$names" "$text" >"$root/inbox/.$name.tmp"
mv -- "$root/inbox/.$name.tmp" "$root/inbox/$name.prompt.txt"

# 3. Wait for the receipt or the error file, never for an image. Check first: it may exist before inotifywait starts.
receipt=$root/outbox/$name.receipt.toml error=$root/errors/$name.error.toml
until [ -e "$receipt" ] || [ -e "$error" ]; do
    inotifywait -qq -t 2 -e moved_to -e create "$root/outbox" "$root/errors" 2>/dev/null || sleep 0.5
done

# 4. All files are there now. In both result files "charged" and "message" come before any text from the prompt.
value() { sed -n "s/^$1 = //p" "$2" | head -n 1; }
if [ -e "$error" ]; then
    echo "$(value message "$error") (charged: $(value charged "$error"))" >&2
    echo "$(value next "$error")" >&2
    exit 1
fi
for image in "$root/outbox/$name".[pjw]* "$root/outbox/$name"-[1-4].[pjw]*; do
    [ ! -e "$image" ] || echo "$image"
done
credits=$(value credits_charged "$receipt")
echo "${credits:-an unknown number of} credits" >&2
