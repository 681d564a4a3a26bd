#!/bin/sh
# A script of standard tools for comparison: inotifywait, xargs -P8, curl, a Python decoder.
#
#     bench/shell.sh ROOT URL
#
# It syncs nothing. After a crash a job is lost or paid for twice.
set -eu
case $1 in
job)
    root=$2 url=$3 name=$4
    stem=${name%.prompt.txt}
    sed -n '4,$p' "$root/inbox/$name" | python3 -c '
import json, sys
print(json.dumps({"provider": "flux", "prompt": sys.stdin.read().strip()}))' |
        curl -sf -H 'Content-Type: application/json' -H 'Authorization: Bearer bench' --data-binary @- \
            "$url/v1/images/generations" |
        python3 -c '
import base64, json, sys
response = json.load(sys.stdin)
open(sys.argv[1], "wb").write(base64.b64decode(response["images"][0]["b64_json"]))' "$root/outbox/.$stem"
    mv "$root/outbox/.$stem" "$root/outbox/$stem.png"
    echo "source = \"$name\"" >"$root/outbox/.$stem"
    mv "$root/outbox/.$stem" "$root/outbox/$stem.receipt.toml"
    mv "$root/inbox/$name" "$root/archive/$name"
    ;;
*)
    mkdir -p "$1/inbox" "$1/outbox" "$1/archive"
    inotifywait -q -m -e close_write,moved_to --include '\.prompt\.txt$' --format '%f' "$1/inbox" |
        xargs -P8 -I{} "$0" job "$1" "$2" {}
    ;;
esac
