//! A reader of the kernel's type information, for one question: where in a structure a member lies.
//!
//! Layout: the kernel's Documentation/bpf/btf.rst. The kernel is trusted, the reader is not: every access is checked,
//! so that an unexpected file is an error.

use std::path::Path;

use super::KernelError;

const VMLINUX: &str = "/sys/kernel/btf/vmlinux";
const MAGIC: u16 = 0xeb9f;
/// Types that stand for one another, at most; the kernel has three or four.
const DEEPEST: usize = 16;
const POINTER: u64 = 8;

mod kind {
    pub const INT: u32 = 1;
    pub const PTR: u32 = 2;
    pub const ARRAY: u32 = 3;
    pub const STRUCT: u32 = 4;
    pub const UNION: u32 = 5;
    pub const ENUM: u32 = 6;
    pub const TYPEDEF: u32 = 8;
    pub const VOLATILE: u32 = 9;
    pub const CONST: u32 = 10;
    pub const RESTRICT: u32 = 11;
    pub const FUNC_PROTO: u32 = 13;
    pub const VAR: u32 = 14;
    pub const DATASEC: u32 = 15;
    pub const DECL_TAG: u32 = 17;
    pub const TYPE_TAG: u32 = 18;
    pub const ENUM64: u32 = 19;
}

/// A kernel's types.
pub struct Btf {
    bytes: Vec<u8>,
    /// Where each type begins; the first is `void`.
    types: Vec<usize>,
    strings: usize,
}

/// A member that was found.
#[derive(Clone, Copy, Debug)]
struct Member {
    bits: u64,
    kind: u32,
    /// Its size is given in bits as well.
    is_field: bool,
}

impl Btf {
    /// Of the running kernel.
    pub fn of_this_kernel() -> Result<Self, KernelError> {
        let bytes = std::fs::read(Path::new(VMLINUX))
            .map_err(|error| KernelError::Btf(format!("cannot be read ({error})")))?;
        Self::parse(bytes).ok_or_else(|| KernelError::Btf("is not what it should be".to_owned()))
    }

    fn parse(bytes: Vec<u8>) -> Option<Self> {
        if u16::from_le_bytes(bytes.get(..2)?.try_into().ok()?) != MAGIC {
            return None;
        }
        let header = word(&bytes, 4)? as usize;
        let begin = header.checked_add(word(&bytes, 8)? as usize)?;
        let end = begin.checked_add(word(&bytes, 12)? as usize)?;
        let strings = header.checked_add(word(&bytes, 16)? as usize)?;
        bytes.get(begin..end)?;
        let mut types = vec![0];
        let mut at = begin;
        while at < end {
            types.push(at);
            let info = word(&bytes, at + 4)?;
            at = at
                .checked_add(12)?
                .checked_add(length((info >> 24) & 0x1f, count(info)))?;
        }
        Some(Self {
            bytes,
            types,
            strings,
        })
    }

    /// Byte offset of a member in a structure. `path` leads through structures within it, of which anonymous ones need not be named;
    /// the member must be of `size` bytes.
    pub fn offset(&self, structure: &str, path: &[&str], size: u64) -> Result<u64, KernelError> {
        let name = path.join(".");
        let found = self.find(structure, path).ok_or_else(|| {
            KernelError::Btf(format!(
                "does not describe `{name}` of `struct {structure}`"
            ))
        })?;
        let size_in_bytes = self.size(found.kind).filter(|_| !found.is_field);
        let (Some(0), Some(actual)) = (found.bits.checked_rem(8), size_in_bytes) else {
            return Err(KernelError::Btf(format!(
                "describes `{name}` of `struct {structure}` as something else than bytes"
            )));
        };
        if actual != size {
            return Err(KernelError::Btf(format!(
                "describes `{name}` of `struct {structure}` with {actual} bytes, not {size}"
            )));
        }
        Ok(found.bits / 8)
    }

    /// Bit offset of a member that may be a bit field: on this machine's byte order, bit `n` is bit `n % 8` of byte `n / 8`.
    pub fn bit(&self, structure: &str, path: &[&str]) -> Result<u64, KernelError> {
        let found = self.find(structure, path).ok_or_else(|| {
            let name = path.join(".");
            KernelError::Btf(format!(
                "does not describe `{name}` of `struct {structure}`"
            ))
        })?;
        Ok(found.bits)
    }

    /// The value that an enumeration gives a name.
    pub fn enumerator(&self, enumeration: &str, wanted: &str) -> Result<u64, KernelError> {
        let found = (1..self.types.len() as u32).find_map(|id| {
            let (name, info) = self.header(id)?;
            let is_it = (info >> 24) & 0x1f == kind::ENUM
                && self.text(name) == Some(enumeration.as_bytes());
            let body = self.types.get(id as usize)? + 12;
            let values = (0..count(info))
                .filter(|_| is_it)
                .map(|index| body + 8 * index);
            values
                .into_iter()
                .find(|at| {
                    let name = self.word(*at).and_then(|name| self.text(name));
                    name == Some(wanted.as_bytes())
                })
                .and_then(|at| self.word(at + 4))
        });
        found.map(u64::from).ok_or_else(|| {
            KernelError::Btf(format!(
                "does not describe `{wanted}` of `enum {enumeration}`"
            ))
        })
    }

    fn find(&self, structure: &str, path: &[&str]) -> Option<Member> {
        (1..self.types.len() as u32)
            .filter(|id| {
                self.header(*id).is_some_and(|(name, info)| {
                    (info >> 24) & 0x1f == kind::STRUCT
                        && self.text(name) == Some(structure.as_bytes())
                })
            })
            .find_map(|id| self.walk(id, path))
    }

    fn walk(&self, structure: u32, path: &[&str]) -> Option<Member> {
        let mut found = Member {
            bits: 0,
            kind: structure,
            is_field: false,
        };
        for name in path {
            let member = self.member(found.kind, name, DEEPEST)?;
            found = Member {
                bits: found.bits.checked_add(member.bits)?,
                ..member
            };
        }
        Some(found)
    }

    /// A member of a structure or union, or of one without a name in it.
    fn member(&self, structure: u32, wanted: &str, deepest: usize) -> Option<Member> {
        let deeper = deepest.checked_sub(1)?;
        let id = self.resolve(structure)?;
        let (_, info) = self.header(id)?;
        if !matches!((info >> 24) & 0x1f, kind::STRUCT | kind::UNION) {
            return None;
        }
        let body = self.types.get(id as usize)? + 12;
        for index in 0..count(info) {
            let entry = body + index * 12;
            let name = self.text(self.word(entry)?)?;
            let kind = self.word(entry + 4)?;
            let offset = self.word(entry + 8)?;
            // With the flag set the upper byte is the size of a bit field.
            let (bits, is_field) = match info >> 31 {
                0 => (offset, false),
                _ => (offset & 0x00ff_ffff, offset >> 24 != 0),
            };
            let bits = u64::from(bits);
            if name == wanted.as_bytes() {
                return Some(Member {
                    bits,
                    kind,
                    is_field,
                });
            }
            if name.is_empty()
                && let Some(inner) = self.member(kind, wanted, deeper)
            {
                return Some(Member {
                    bits: bits.checked_add(inner.bits)?,
                    ..inner
                });
            }
        }
        None
    }

    /// What a type stands for.
    fn resolve(&self, mut id: u32) -> Option<u32> {
        for _ in 0..DEEPEST {
            let (_, info) = self.header(id)?;
            match (info >> 24) & 0x1f {
                kind::TYPEDEF | kind::VOLATILE | kind::CONST | kind::RESTRICT | kind::TYPE_TAG => {
                    id = self.word(self.types.get(id as usize)? + 8)?
                }
                _ => return Some(id),
            }
        }
        None
    }

    /// In bytes.
    fn size(&self, id: u32) -> Option<u64> {
        let id = self.resolve(id)?;
        let (_, info) = self.header(id)?;
        match (info >> 24) & 0x1f {
            kind::PTR => Some(POINTER),
            kind::INT | kind::STRUCT | kind::UNION | kind::ENUM | kind::ENUM64 => {
                Some(self.word(self.types.get(id as usize)? + 8)?.into())
            }
            _ => None,
        }
    }

    /// A type's name and info words.
    fn header(&self, id: u32) -> Option<(u32, u32)> {
        if id == 0 {
            return None;
        }
        let at = *self.types.get(id as usize)?;
        Some((self.word(at)?, self.word(at + 4)?))
    }

    fn word(&self, at: usize) -> Option<u32> {
        word(&self.bytes, at)
    }

    fn text(&self, name: u32) -> Option<&[u8]> {
        let start = self.strings.checked_add(name as usize)?;
        self.bytes.get(start..)?.split(|byte| *byte == 0).next()
    }
}

fn count(info: u32) -> usize {
    (info & 0xffff) as usize
}

/// What follows a type's header, in bytes.
fn length(kind: u32, count: usize) -> usize {
    match kind {
        kind::INT | kind::VAR | kind::DECL_TAG => 4,
        kind::ARRAY => 12,
        kind::STRUCT | kind::UNION | kind::DATASEC | kind::ENUM64 => count * 12,
        kind::ENUM | kind::FUNC_PROTO => count * 8,
        _ => 0,
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(
        bytes.get(at..at.checked_add(4)?)?.try_into().ok()?,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kernel() -> Btf {
        Btf::of_this_kernel().unwrap()
    }

    #[test]
    fn finds_members_of_this_kernel() {
        let btf = kernel();
        let send = btf.offset("tcp_sock", &["write_seq"], 4).unwrap();
        assert!(send > 500 && send < 8192, "{send}");
        let error = btf.offset("sock", &["sk_err"], 4).unwrap();
        assert!(error > 0 && error < send, "{error}");
    }

    #[test]
    fn finds_members_of_structures_within_named_and_anonymous_ones() {
        let btf = kernel();
        let common = |path: &[&str], size| btf.offset("sock", path, size).unwrap();
        // Two names of one place: `skc_addrpair` lies in a union without a name.
        let pair = common(&["__sk_common", "skc_addrpair"], 8);
        assert_eq!(common(&["__sk_common", "skc_daddr"], 4), pair);
        assert_eq!(common(&["__sk_common", "skc_rcv_saddr"], 4), pair + 4);
        let backlog = common(&["sk_backlog", "rmem_alloc"], 4);
        assert!(backlog < common(&["sk_backlog", "len"], 4));
    }

    #[test]
    fn refuses_what_is_not_there_and_what_has_another_size() {
        let btf = kernel();
        for (structure, path, size) in [
            ("tcp_sock", &["no_such_member"][..], 4),
            ("no_such_structure", &["write_seq"], 4),
            ("tcp_sock", &["write_seq"], 8),
            ("tcp_sock", &["write_seq", "deeper"], 4),
            // A bit field.
            ("tcp_sock", &["nonagle"], 1),
        ] {
            let found = btf.offset(structure, path, size);
            assert!(
                matches!(found, Err(KernelError::Btf(_))),
                "{path:?}: {found:?}"
            );
        }
    }

    /// A kernel in which a member has another name, or its type another size, is refused and never misread.
    #[test]
    fn an_altered_description_is_refused() {
        let mut btf = kernel();
        let name = b"\0copied_seq\0";
        let at = btf
            .bytes
            .windows(name.len())
            .position(|bytes| bytes == name)
            .unwrap();
        assert!(btf.offset("tcp_sock", &["copied_seq"], 4).is_ok());
        btf.bytes[at + 1] = b'k';
        assert!(btf.offset("tcp_sock", &["copied_seq"], 4).is_err());
        btf.bytes[at + 1] = b'c';
        let member = btf.find("tcp_sock", &["copied_seq"]).unwrap();
        let size = btf.types[btf.resolve(member.kind).unwrap() as usize] + 8;
        btf.bytes[size] = 8;
        assert!(btf.offset("tcp_sock", &["copied_seq"], 4).is_err());
    }

    #[test]
    fn malformed_information_is_an_error_not_a_panic() {
        let bytes = std::fs::read(VMLINUX).unwrap();
        assert!(Btf::parse(bytes.get(..4096).unwrap().to_vec()).is_none());
        for length in 0..64 {
            assert!(Btf::parse(vec![0xff; length]).is_none());
        }
        // Every type stands for itself: looking must end.
        let mut btf = kernel();
        let all: Vec<usize> = btf.types.iter().skip(1).copied().collect();
        for (id, at) in all.into_iter().enumerate() {
            let info = btf.word(at + 4).unwrap();
            if (info >> 24) & 0x1f == kind::TYPEDEF {
                let own = u32::try_from(id + 1).unwrap().to_le_bytes();
                btf.bytes[at + 8..at + 12].copy_from_slice(&own);
            }
        }
        let _ = btf.offset("sock", &["sk_lock", "owned"], 4);
    }
}
