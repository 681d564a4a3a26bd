#!/bin/sh
# Drop a prompt, wait for what becomes of it, print the pictures. The folder protocol in shell; needs no imagewatch.
#
#   submit.sh ROOT "PROMPT" [IMAGE]…
#
# ROOT has inbox, outbox and errors in it. Ends with 0 when there is a picture, with 1 when there is an error file.
# With 64 nothing was dropped.
set -eu

root=$1 text=$2
shift 2
name=$(date -u +%Y%m%d-%H%M%S)-$$ # nobody else's

for image in "$@"; do
    case ${image##*/} in # its own name, as a folder may have a dot in it, too
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

# 3. Wait for the receipt or the error file, never for a picture. Look first: it may be there before we listen.
receipt=$root/outbox/$name.receipt.toml error=$root/errors/$name.error.toml
until [ -e "$receipt" ] || [ -e "$error" ]; do
    inotifywait -qq -t 2 -e moved_to -e create "$root/outbox" "$root/errors" 2>/dev/null || sleep 0.5
done

# 4. Everything is there now. In both documents "charged" and "message" stand in lines before any text of a stranger's.
value() { sed -n "s/^$1 = //p" "$2" | head -n 1; }
if [ -e "$error" ]; then
    echo "$(value message "$error") (charged: $(value charged "$error"))" >&2
    echo "$(value next "$error")" >&2
    exit 1
fi
for picture in "$root/outbox/$name".[pjw]* "$root/outbox/$name"-[1-4].[pjw]*; do
    [ ! -e "$picture" ] || echo "$picture"
done
credits=$(value credits_charged "$receipt")
echo "${credits:-an unknown number of} credits" >&2
