# Removes what a test process made, once that process is gone, however it ended: its death closes the pipe on our
# standard input. Names are the harness's own (run.rs); $1 is the part all fabrics of the process share.
prefix=$1 cgroups=$2 bpffs=$3 run=$4
[ -n "$prefix" ] && [ -n "$cgroups" ] && [ -n "$bpffs" ] && [ -n "$run" ] || exit 1
trap '' HUP INT TERM PIPE
cat >/dev/null

for group in "$cgroups/culvert-test-$prefix"*; do
    [ -d "$group" ] && echo 1 >"$group/cgroup.kill"
done
for netns in "/run/netns/cv-$prefix"*; do
    [ -e "$netns" ] || continue
    umount -l "$netns"
    rm -f -- "$netns"
done
rm -rf -- "$bpffs/culvert-test-$prefix"* "$run/culvert-test-$prefix"*
for attempt in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
    left=
    for group in "$cgroups/culvert-test-$prefix"*; do
        [ -d "$group" ] || continue
        find "$group" -depth -type d -exec rmdir {} \; || left=yes
    done
    [ -z "$left" ] && exit 0
    sleep 0.1
done
exit 1
