#!/usr/bin/env bash
# SPDX-License-Identifier: MPL-2.0
# machine.sh PROGRAM SCRIPT [FILE]: boots systemd in a machine of its own, over a throw-away copy of this host's files, and runs
# SCRIPT there with Debian's python3. PROGRAM (hookshot.py) is at /usr/local/bin/hookshot.py, and examples/systemd/ at
# /usr/local/share/hookshot/; what a clone has is in /root/hookshot/, and FILE is /usr/local/lib/file.
# Ends with SCRIPT's status; 77: no machine can be had here, and stderr says why.
# Whatever happens, nothing is left behind.
set -euo pipefail
program=$1 script=$2 file=${3:-/dev/null}
folder=$(mktemp -d) nspawn='' leader=''

unavailable() { echo "$*" >&2; exit 77; }

clean_up() {
    # With its first process all others end. Not by poweroff, which waits for the disks of the host (sync).
    if [[ -n $leader ]]; then kill -KILL "$leader" 2>/dev/null || :; fi
    if [[ -n $nspawn ]]; then
        for _ in {1..50}; do kill -0 "$nspawn" 2>/dev/null || break; sleep 0.1; done
        kill -KILL "$nspawn" 2>/dev/null || :
        wait "$nspawn" 2>/dev/null || :
    fi
    umount "$folder/root" 2>/dev/null || :
    umount "$folder" 2>/dev/null || umount -l "$folder" 2>/dev/null || :
    rmdir "$folder" 2>/dev/null || :
    # Where no systemd runs the host, nspawn's own groups stay.
    local group
    for group in /sys/fs/cgroup{,/systemd,/unified}/{payload,supervisor}; do
        if [[ -d $group ]]; then find "$group" -depth -type d -exec rmdir {} + 2>/dev/null || :; fi
    done
}
trap clean_up EXIT
trap 'exit 143' TERM INT HUP

((EUID == 0)) || unavailable "needs root"
# One at a time: two machines would find themselves in the same control groups. Suites that run side by side wait for each other.
exec 9>/run/lock/hookshot-test-machine.lock
flock --timeout 1000 9 || { echo "another machine has run for 1000 s" >&2; exit 1; }
mount -t tmpfs -o size=512m tmpfs "$folder" 2>/dev/null || unavailable "no tmpfs may be mounted here"
mkdir "$folder"/{upper,work,root}
root=$folder/root
mount -t overlay overlay -o "lowerdir=/,upperdir=$folder/upper,workdir=$folder/work" "$root" 2>/dev/null || unavailable "no overlay of this host's files may be mounted"

# Not the host's units: only what the machine itself needs.
tr -d - </proc/sys/kernel/random/uuid >"$root/etc/machine-id"
rm -rf "$root"/etc/systemd/system/*
ln -s /lib/systemd/system/multi-user.target "$root/etc/systemd/system/default.target"
ln -s /dev/null "$root/etc/systemd/system/systemd-firstboot.service"
install -D "$program" "$root/usr/local/bin/hookshot.py"
install -D -m 0644 -t "$root/usr/local/share/hookshot" "$(dirname "$0")"/../examples/systemd/*
install -D "$script" "$root/usr/local/lib/script.py"
install -m 0644 "$file" "$root/usr/local/lib/file"
mkdir "$root/root/hookshot"
cp -r "$program" "$(dirname "$0")"/../{build_zipapp.py,examples} "$root/root/hookshot"

nspawn_options=(--quiet --directory="$root" --register=no --keep-unit --private-network --console=pipe)
systemd-nspawn "${nspawn_options[@]}" /bin/true >"$folder/probe" 2>&1 </dev/null 9>&- ||
    unavailable "systemd-nspawn starts nothing here: $(tail -n 1 "$folder/probe")"

setsid systemd-nspawn "${nspawn_options[@]}" --boot >"$folder/boot" 2>&1 </dev/null 9>&- &
nspawn=$!
for _ in {1..300}; do
    leader=$(cat "/proc/$nspawn/task/$nspawn/children" 2>/dev/null || :) leader=${leader%% *}
    [[ -n $leader ]] && nsenter -t "$leader" -a systemctl is-system-running 2>/dev/null | grep -Eq 'running|degraded' && break
    kill -0 "$nspawn" 2>/dev/null || { cat "$folder/boot" >&2; exit 1; }
    sleep 0.1
done
# In the background, so that a signal is heeded at once.
nsenter -t "$leader" -a /usr/bin/env -i PATH="$PATH" HOME=/root LANG=C.UTF-8 /usr/bin/python3 /usr/local/lib/script.py </dev/null 9>&- &
wait $!
