#!/bin/sh
# Print the package's changelog. The only place of the version is imagewatch/__init__.py; what changed is in CHANGELOG.md.
# One version has a package for each release of Debian; ~deb12 is lower than ~deb13, so an upgrade of Debian replaces it.
set -eu
cd "$(dirname "$0")/.."
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' imagewatch/__init__.py | sed -E 's/(a|b|rc|\.dev)([0-9]+)$/~\1\2/')
. /etc/os-release
cat << EOF
imagewatch ($version-1~deb$VERSION_ID) $VERSION_CODENAME; urgency=medium

  * Version $version; changelog.gz has the changes.

 -- $(sed -n 's/^Maintainer: //p' debian/control)  $(date --utc --rfc-email --date="@$SOURCE_DATE_EPOCH")
EOF
