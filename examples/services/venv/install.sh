#!/bin/sh
# SPDX-License-Identifier: MPL-2.0
# install.sh PACKAGE VERSION: make venvs/VERSION with that package, from the wheels in wheels/ alone.
#
# An environment cannot be renamed, since its scripts hold its path. So it is made in its place, and a file in it says
# that it is complete; one without is made anew. The one in use has that file, and is never touched.
set -eu
package=$1 version=$2 folder=venvs/$2

if [ -e "$folder/complete" ]; then
    echo "$folder is there"
    exit 0
fi
python3 -m venv --clear "$folder"
# No index: nothing is installed that was not uploaded.
"$folder/bin/python" -m pip install --disable-pip-version-check --no-cache-dir --quiet \
    --no-index --find-links wheels "$package==$version"
touch "$folder/complete"
