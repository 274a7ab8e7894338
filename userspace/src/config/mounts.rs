//! Finding mounted filesystems in the text of `/proc/self/mountinfo` (see proc_pid_mountinfo(5)).
//! Pure; malformed lines are passed over. Called by the configuration for its defaults.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// Where a filesystem of type `fstype` is mounted: of several, the first whose root is visible in full, else the first.
/// A mount hidden under a later one on the same directory does not count.
pub fn find(mountinfo: &[u8], fstype: &str) -> Option<PathBuf> {
    let mounts: Vec<Mount> = mountinfo
        .split(|byte| *byte == b'\n')
        .filter_map(parse_line)
        .collect();
    let visible = |index: usize, mount: &Mount| {
        !mounts
            .iter()
            .skip(index + 1)
            .any(|later| later.point == mount.point)
    };
    let mut candidates = mounts
        .iter()
        .enumerate()
        .filter(|(index, mount)| mount.fstype == fstype.as_bytes() && visible(*index, mount))
        .map(|(_, mount)| mount)
        .peekable();
    let first = candidates.peek().copied();
    let chosen = candidates.find(|mount| mount.root == b"/").or(first)?;
    Some(PathBuf::from(OsString::from_vec(chosen.point.clone())))
}

struct Mount<'a> {
    root: &'a [u8],
    point: Vec<u8>,
    fstype: &'a [u8],
}

/// `36 35 98:0 /root /point options [optional fields] - fstype source options`
fn parse_line(line: &[u8]) -> Option<Mount<'_>> {
    let mut words = line.split(|byte| *byte == b' ');
    let root = words.nth(3)?;
    let point = unescape(words.next()?);
    let fstype = words.skip_while(|word| *word != b"-").nth(1)?;
    (point.first() == Some(&b'/')).then_some(Mount {
        root,
        point,
        fstype,
    })
}

/// The kernel writes space, tab, newline and backslash as `\` and three octal digits.
fn unescape(escaped: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(escaped.len());
    let mut rest = escaped;
    while let Some((byte, after)) = rest.split_first() {
        match (byte, octal(after)) {
            (b'\\', Some(decoded)) => {
                plain.push(decoded);
                rest = after.get(3..).unwrap_or_default();
            }
            _ => {
                plain.push(*byte);
                rest = after;
            }
        }
    }
    plain
}

fn octal(digits: &[u8]) -> Option<u8> {
    let text = std::str::from_utf8(digits.get(..3)?).ok()?;
    text.bytes()
        .all(|byte| byte.is_ascii_digit())
        .then(|| u8::from_str_radix(text, 8).ok())?
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    const HYBRID: &[u8] = b"25 30 0:23 / /sys rw,nosuid shared:7 - sysfs sysfs rw\n\
          30 25 0:26 / /sys/fs/cgroup ro shared:9 - tmpfs tmpfs ro,mode=755\n\
          31 30 0:27 / /sys/fs/cgroup/unified rw,nosuid shared:10 - cgroup2 cgroup2 rw,nsdelegate\n\
          33 25 0:29 / /sys/fs/bpf rw shared:12 master:3 - bpf none rw,mode=700\n";

    fn found(mountinfo: &[u8], fstype: &str) -> Option<PathBuf> {
        find(mountinfo, fstype)
    }

    #[test]
    fn cgroup_v2_beside_v1_is_found() {
        assert_eq!(
            found(HYBRID, "cgroup2").as_deref(),
            Some(Path::new("/sys/fs/cgroup/unified"))
        );
        assert_eq!(
            found(HYBRID, "bpf").as_deref(),
            Some(Path::new("/sys/fs/bpf"))
        );
        assert_eq!(found(HYBRID, "cgroup"), None);
    }

    #[test]
    fn octal_escapes_are_decoded() {
        let line = b"1 2 0:3 / /mnt/a\\040b\\134c\\011d rw - cgroup2 none rw\n";
        assert_eq!(
            found(line, "cgroup2").as_deref(),
            Some(Path::new("/mnt/a b\\c\td"))
        );
        // Not an escape: taken as it stands.
        let odd = b"1 2 0:3 / /mnt/a\\9z\\04 rw - cgroup2 none rw";
        assert_eq!(
            found(odd, "cgroup2").as_deref(),
            Some(Path::new("/mnt/a\\9z\\04"))
        );
        assert_eq!(octal(b"777"), None);
        assert_eq!(octal(b"+12"), None);
    }

    #[test]
    fn a_full_root_is_preferred_to_a_part() {
        let text =
            b"1 2 0:3 /../.. /inner rw - cgroup2 none rw\n2 2 0:3 / /outer rw - cgroup2 none rw\n";
        assert_eq!(found(text, "cgroup2").as_deref(), Some(Path::new("/outer")));
        let only = b"1 2 0:3 /../.. /inner rw - cgroup2 none rw\n";
        assert_eq!(found(only, "cgroup2").as_deref(), Some(Path::new("/inner")));
    }

    #[test]
    fn a_mount_hidden_by_a_later_one_does_not_count() {
        let text = b"1 2 0:3 / /a rw - bpf none rw\n2 2 0:4 / /a rw - tmpfs none rw\n";
        assert_eq!(found(text, "bpf"), None);
    }

    #[test]
    fn malformed_lines_are_passed_over() {
        for text in [
            &b""[..],
            b"\n\n",
            b"1 2 3",
            b"1 2 0:3 / /a rw - ",
            b"1 2 0:3 / /a rw",
            b"1 2 0:3 / relative rw - bpf none",
            b"\xff\xfe - - - - - - bpf",
        ] {
            assert_eq!(found(text, "bpf"), None, "{text:?}");
        }
    }
}
