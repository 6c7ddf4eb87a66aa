# Install system packages: Python, its headers for compilers, and the packages given as arguments.
set -eu
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -qqy --no-install-recommends bash ca-certificates python3-dev "$@" >/dev/null
rm -rf /var/lib/apt/lists/* /var/cache/apt/archives/*.deb /var/cache/debconf/*-old /var/log/apt /var/log/dpkg.log \
    /usr/share/doc/*/changelog* /usr/share/man/*
find /usr/lib -name "libpython*.a" -delete
python3 -c 'import sys; sys.exit(sys.version_info < (3, 11) and "the base has Python %d.%d: use one with 3.11 or newer" % sys.version_info[:2])'
# Remove setuid and setgid bits. Group 0 may write to /cache, so any user id works, as OpenShift requires.
find / -xdev -type f -perm /6000 -exec chmod a-s {} +
mkdir -p /cache && chgrp 0 /cache && chmod 0775 /cache
