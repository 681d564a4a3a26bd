#!/usr/bin/env bash
# Builds the image with Podman and without a registry: .ci/image.sh NAME [OPTION of podman build]...
#
# Its base is made from Debian packages. The Python packages are downloaded here, by this machine's pip, and checked by
# their hashes; the build itself has no network. Needs Debian, root, podman, mmdebstrap and pip.
#
#   PODMAN               the command, with options for its storage
#   REQUIREMENTS         "postgres" adds the driver for a shared database
#   VARIANT              of mmdebstrap; "extract" is faster, and dpkg does not know the packages then
#   SOURCE_DATE_EPOCH    the time of all files and of the image
set -euo pipefail
cd "$(dirname "$0")/.."
name=$1
shift
read -ra podman <<< "${PODMAN:-podman}"
requirements=${REQUIREMENTS:-service} variant=${VARIANT:-essential}
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# 1. The base
suite=$(. /etc/os-release && test "$ID" = debian && echo "$VERSION_CODENAME")
packages=python3,tzdata,ca-certificates
test "$variant" = essential || packages=base-files,base-passwd,coreutils,dash,libc-bin,$packages
options=()
for path in /usr/share/{doc,info,lintian,locale,man}; do options+=("--dpkgopt=path-exclude=$path/*"); done
options+=('--dpkgopt=path-include=/usr/share/doc/*/copyright')
mmdebstrap --quiet --variant="$variant" --include="$packages" "${options[@]}" "$suite" "$work/base.tar"
printf 'FROM scratch\nADD base.tar /\nCMD ["/bin/sh"]\n' > "$work/Containerfile"
"${podman[@]}" build --quiet --timestamp "$SOURCE_DATE_EPOCH" --tag localhost/imagewatch-base "$work"
rm "$work/base.tar"

# 2. The Python packages, and this machine's pip, which the base does not have
python3 -m pip download -qq --only-binary :all: --require-hashes -d "$work/packages" -r "requirements/$requirements.txt" -r requirements/build.txt
mkdir "$work/pip"
cp -r "$(python3 -c 'import os, pip; print(os.path.dirname(pip.__file__))')" "$work/pip/"
library=$("${podman[@]}" run --rm --network none localhost/imagewatch-base \
    python3 -c 'import sys; print("/usr/local/lib/python%d.%d/dist-packages" % sys.version_info[:2])')

# 3. The image. Podman's default format has no health check.
"${podman[@]}" build --quiet --format docker --timestamp "$SOURCE_DATE_EPOCH" --tag "$name" --pull-never --network none \
    --volume "$work/packages:/packages:ro" --volume "$work/pip:$library:ro" \
    --build-arg BASE=localhost/imagewatch-base --build-arg REQUIREMENTS="$requirements" \
    --build-arg PIP_NO_INDEX=1 --build-arg PIP_FIND_LINKS=/packages "$@" .
