#!/bin/sh
# SPDX-License-Identifier: MPL-2.0
# update.sh SERVICE IMAGE: have a service of the swarm run this image, wait until it does, and see that it stayed.
set -eu
service=$1 image=$2

# How tasks are replaced stands in stack.yaml. --with-registry-auth passes this user's login on to the nodes.
docker service update --detach=false --quiet --with-registry-auth --update-failure-action rollback \
    --image "$image" "$service"
# The exit status is 0 also where Swarm has gone back. The image is followed by its digest where the registry told it.
runs=$(docker service inspect --format '{{.Spec.TaskTemplate.ContainerSpec.Image}}' "$service")
case $runs in
    "$image" | "$image"@*) echo "service $service runs $runs" ;;
    *) echo "service $service runs $runs, not $image" >&2; exit 1 ;;
esac
