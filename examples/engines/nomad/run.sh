#!/bin/sh
# SPDX-License-Identifier: MPL-2.0
# run.sh JOB IMAGE: run JOB.nomad.hcl with this image, wait until it is deployed, and see that it is what runs.
set -eu
job=$1 image=$2
# A token is no argument, since every user of the host sees those.
NOMAD_TOKEN=$(cat "$NOMAD_TOKEN_FILE")
export NOMAD_TOKEN

nomad job run "-var=image=$image" "$job.nomad.hcl"
# With auto_revert Nomad goes back when allocations fail, and not every version of "job run" says so by its exit status.
runs=$(nomad job inspect -t '{{range .TaskGroups}}{{range .Tasks}}{{.Config.image}} {{end}}{{end}}' "$job")
case " $runs " in
    *" $image "*) echo "job $job runs $image" ;;
    *) echo "job $job runs $runs, not $image" >&2; exit 1 ;;
esac
