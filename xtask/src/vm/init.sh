#!/bin/sh
# The guest's first and only program: prepares the machine, runs the tests, says how they ended, powers off.
export PATH=/bin:/sbin HOME=/root
fail() {
    echo "guest: $*"
    echo "guest: status 125"
    poweroff -f
}
mount -t proc proc /proc && mount -t sysfs sys /sys && mount -t devtmpfs dev /dev || fail "no /proc, /sys and /dev"
mkdir -p /dev/shm
for directory in /tmp /run /dev/shm; do
    mount -t tmpfs tmpfs "$directory" || fail "no tmpfs on $directory"
done
mount -t cgroup2 cgroup /sys/fs/cgroup || fail "this kernel has no cgroup v2"
mount -t bpf bpf /sys/fs/bpf || fail "this kernel has no bpffs"
while read -r module; do
    modprobe "$module" || fail "cannot load the module $module"
done </culvert/modules
# As many descriptors as a login gives root on most machines, not the kernel's 1,024.
ulimit -n 20000 || fail "descriptors stay few"
# As much memory for TCP, in pages, as a machine of 8 GiB has: tests run side by side, and what some take on purpose others lack.
echo 98304 131072 196608 >/proc/sys/net/ipv4/tcp_mem || fail "the memory for TCP stays little"
ip link set lo up || fail "the loopback device does not come up"

# One argument a line: they hold what a user typed.
set --
while IFS= read -r argument; do
    set -- "$@" "$argument"
done </culvert/arguments

export CULVERT_BINARY=/culvert/culvert CULVERT_PROBE=/culvert/culvert-probe CULVERT_TEST_PATIENCE=4
cd /tmp || fail "no /tmp"
echo "guest: Linux $(uname -r)"
/culvert/tests "$@" </dev/null 2>&1
echo "guest: status $?"
poweroff -f
