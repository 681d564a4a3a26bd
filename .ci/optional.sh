#!/usr/bin/env bash
# Installs the packages that only some tests need: all at the same time or, if one of them cannot be had, each by itself.
# Prints which are missing at the end; without them, these tests are skipped.
set -euo pipefail

optional=(bindfs chromium debhelper fish fuse3 git inotify-tools lintian man-db nano openssh-server pgbouncer postgresql prometheus python3-pip)
optional+=(rclone rsync samba smbclient strace syncthing systemd-container unzip vim-tiny zsh)

absent() {
    for name in "${optional[@]}"; do
        [ "$(dpkg-query --show --showformat='${db:Status-Status}' "$name" 2>/dev/null)" = installed ] || echo "$name"
    done
}
install() { DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "$@"; }

mapfile -t missing < <(absent)
if [ "${#missing[@]}" -gt 0 ] && command -v apt-get >/dev/null; then
    apt-get update -q || true
    install "${missing[@]}" || for name in "${missing[@]}"; do install "$name" || true; done
    mapfile -t missing < <(absent)
fi
[ "${#missing[@]}" -eq 0 ] || echo "not installed: ${missing[*]}"
