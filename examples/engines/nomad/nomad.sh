#!/bin/sh
# SPDX-License-Identifier: MPL-2.0
# nomad.sh ARGUMENTS...: nomad with the token that stands in the file NOMAD_TOKEN_FILE. A token is no argument, since
# every user of the host sees those.
set -eu
NOMAD_TOKEN=$(cat "$NOMAD_TOKEN_FILE")
export NOMAD_TOKEN
exec nomad "$@"
