//! Where the programs find what they read from the kernel's own structures, and the limits they are given.

use super::{KernelError, NetnsCookie, btf::Btf};

/// Bytes that a socket may have unread before its peer sends by TCP. Enough for any stream to go on; a sender whose peer does not
/// read parks little more than by TCP.
const SHORT_LIMIT: u64 = 3 << 20;

/// Globals of the object, by name.
#[derive(Clone, Debug)]
pub(super) struct Offsets {
    globals: Vec<(&'static str, u64)>,
    /// Why nothing can be short-circuited on this kernel.
    pub no_short_circuit: Option<String>,
}

impl Offsets {
    pub fn of_this_kernel() -> Result<Self, KernelError> {
        let btf = Btf::of_this_kernel()?;
        let mut globals = vec![
            (
                "TCP_WRITE_SEQ_OFFSET",
                btf.offset("tcp_sock", &["write_seq"], 4)?,
            ),
            // A `tcp_sock` begins with a `sock`.
            ("SOCK_ERROR_OFFSET", btf.offset("sock", &["sk_err"], 4)?),
        ];
        let no_short_circuit = match short_circuit(&btf) {
            Ok(found) => {
                globals.extend(found);
                None
            }
            Err(reason) => Some(reason.to_string()),
        };
        Ok(Self {
            globals,
            no_short_circuit,
        })
    }

    /// What an instance of the object is loaded with.
    pub fn globals(&self, pod: NetnsCookie) -> Vec<(&'static str, u64)> {
        let mut globals = self.globals.clone();
        globals.push(("POD_COOKIE", pod.0));
        globals
    }
}

fn short_circuit(btf: &Btf) -> Result<Vec<(&'static str, u64)>, KernelError> {
    let sock = |path: &[&str], size| btf.offset("sock", path, size);
    Ok(vec![
        (
            "TCP_COPIED_SEQ_OFFSET",
            btf.offset("tcp_sock", &["copied_seq"], 4)?,
        ),
        (
            "TCP_UPPER_LAYER_OFFSET",
            btf.offset("tcp_sock", &["inet_conn", "icsk_ulp_ops"], 8)?,
        ),
        (
            "TCP_MULTIPATH_OFFSET",
            btf.offset("tcp_sock", &["is_mptcp"], 1)?,
        ),
        (
            "SOCK_COOKIE_OFFSET",
            sock(&["__sk_common", "skc_cookie"], 8)?,
        ),
        ("SOCK_STATE_OFFSET", sock(&["__sk_common", "skc_state"], 1)?),
        (
            "SOCK_UNREAD_OFFSET",
            sock(&["sk_backlog", "rmem_alloc"], 4)?,
        ),
        ("SOCK_OWNED_OFFSET", sock(&["sk_lock", "owned"], 4)?),
        ("SOCK_LOW_WATER_OFFSET", sock(&["sk_rcvlowat"], 4)?),
        ("SOCK_SOCKET_OFFSET", sock(&["sk_socket"], 8)?),
        ("SOCKET_FILE_OFFSET", btf.offset("socket", &["file"], 8)?),
        ("FILE_FLAGS_OFFSET", btf.offset("file", &["f_flags"], 4)?),
        (
            "SOCK_PROTOCOL_OFFSET",
            sock(&["__sk_common", "skc_prot"], 8)?,
        ),
        (
            "PROTOCOL_PRESSURE_OFFSET",
            btf.offset("proto", &["memory_pressure"], 8)?,
        ),
        ("SHORT_LIMIT", SHORT_LIMIT),
    ])
}
