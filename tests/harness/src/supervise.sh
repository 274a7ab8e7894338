# Removes what a test process made, once that process is gone, however it ended: its death closes the pipe on our
# standard input. Names are the harness's own (run.rs); $1 is the part all fabrics of the process share.
prefix=$1 cgroups=$2 bpffs=$3 run=$4
[ -n "$prefix" ] && [ -n "$cgroups" ] && [ -n "$bpffs" ] && [ -n "$run" ] || exit 1
trap '' HUP INT TERM PIPE
cat >/dev/null

# Again and again for half a minute: a program that was just being started, or a device still going away, resists a while.
attempt=0
while [ "$attempt" -lt 300 ]; do
    attempt=$((attempt + 1))
    left=
    for group in "$cgroups/culvert-test-$prefix"*; do
        [ -d "$group" ] && echo 1 >"$group/cgroup.kill"
    done
    for netns in "/run/netns/cv-$prefix"*; do
        [ -e "$netns" ] || continue
        umount -l "$netns"
        rm -f -- "$netns" || left=yes
    done
    rm -rf -- "$bpffs/culvert-test-$prefix"* "$run/culvert-test-$prefix"* || left=yes
    for group in "$cgroups/culvert-test-$prefix"*; do
        [ -d "$group" ] || continue
        find "$group" -depth -type d -exec rmdir {} \;
        [ -d "$group" ] && left=yes
    done
    [ -z "$left" ] && exit 0
    sleep 0.1
done
exit 1
