//! A reader of the kernel's type information, for one question: where in a structure a member lies.
//!
//! Layout: the kernel's Documentation/bpf/btf.rst. The kernel is trusted, the reader is not: every access is checked,
//! so that an unexpected file is an error.

use std::path::Path;

use super::KernelError;

const VMLINUX: &str = "/sys/kernel/btf/vmlinux";
const MAGIC: u16 = 0xeb9f;
const KIND_ARRAY: u32 = 3;
const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;
const KIND_ENUM: u32 = 6;
const KIND_INT: u32 = 1;
const KIND_FUNC_PROTO: u32 = 13;
const KIND_VAR: u32 = 14;
const KIND_DATASEC: u32 = 15;
const KIND_DECL_TAG: u32 = 17;
const KIND_ENUM64: u32 = 19;

/// Byte offset of `member` in `struct name` of the running kernel.
pub fn member_offset(name: &str, member: &str) -> Result<u64, KernelError> {
    let bytes = std::fs::read(Path::new(VMLINUX))
        .map_err(|error| KernelError::Btf(format!("cannot be read ({error})")))?;
    find(&bytes, name, member)
        .ok_or_else(|| KernelError::Btf(format!("does not describe `{member}` of `struct {name}`")))
}

/// Looks `member` up; `None` when the data is malformed or has no such member at a whole byte.
fn find(bytes: &[u8], structure: &str, member: &str) -> Option<u64> {
    if u16::from_le_bytes(bytes.get(..2)?.try_into().ok()?) != MAGIC {
        return None;
    }
    let header = word(bytes, 4)? as usize;
    let types = section(bytes, header, 8)?;
    let strings = section(bytes, header, 16)?;
    let mut at = 0;
    while at < types.len() {
        let name = word(types, at)? as usize;
        let info = word(types, at + 4)?;
        let (kind, count, flag) = ((info >> 24) & 0x1f, (info & 0xffff) as usize, info >> 31);
        let body = at + 12;
        let each = match kind {
            KIND_STRUCT | KIND_UNION | KIND_DATASEC | KIND_ENUM64 => 12,
            KIND_ENUM | KIND_FUNC_PROTO => 8,
            _ => 0,
        };
        if kind == KIND_STRUCT && text(strings, name)? == structure.as_bytes() {
            for index in 0..count {
                let entry = body + index * each;
                if text(strings, word(types, entry)? as usize)? == member.as_bytes() {
                    let offset = word(types, entry + 8)?;
                    // With the flag set the upper byte is the size of a bit field.
                    let bits = if flag == 1 {
                        offset & 0x00ff_ffff
                    } else {
                        offset
                    };
                    return (bits % 8 == 0).then_some(u64::from(bits / 8));
                }
            }
        }
        at = body
            + match kind {
                KIND_INT | KIND_VAR | KIND_DECL_TAG => 4,
                KIND_ARRAY => 12,
                _ => count * each,
            };
    }
    None
}

fn section(bytes: &[u8], header: usize, field: usize) -> Option<&[u8]> {
    let start = header.checked_add(word(bytes, field)? as usize)?;
    let length = word(bytes, field + 4)? as usize;
    bytes.get(start..start.checked_add(length)?)
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(
        bytes.get(at..at.checked_add(4)?)?.try_into().ok()?,
    ))
}

fn text(strings: &[u8], at: usize) -> Option<&[u8]> {
    strings.get(at..)?.split(|byte| *byte == 0).next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_a_member_of_this_kernel() {
        let bytes = std::fs::read(VMLINUX).unwrap();
        let send = find(&bytes, "tcp_sock", "write_seq").unwrap();
        assert!(send > 500 && send < 8192, "{send}");
        assert_eq!(find(&bytes, "tcp_sock", "inet_conn"), Some(0));
        assert_eq!(find(&bytes, "tcp_sock", "no_such_member"), None);
    }

    #[test]
    fn malformed_information_is_an_error_not_a_panic() {
        let mut bytes = std::fs::read(VMLINUX).unwrap();
        bytes.truncate(4096);
        assert_eq!(find(&bytes, "tcp_sock", "write_seq"), None);
        for length in 0..64 {
            assert_eq!(find(&vec![0xff; length], "tcp_sock", "write_seq"), None);
        }
    }
}
