#!/bin/sh
# Gets what the tests of the page need on Debian: node and Chromium, where they are missing and this user may.
command -v node >/dev/null || set -- "$@" nodejs
command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null ||
	set -- "$@" chromium
if [ "$#" -gt 0 ]; then
	echo "installing $* for the tests of the page"
	{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"; } \
		>/dev/null 2>&1 || echo "cannot install $*: the tests that need it will be skipped"
fi
