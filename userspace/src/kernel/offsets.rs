//! Where the programs find what they read from the kernel's own structures, and the limits they are given.

use std::{
    fs::File,
    io::{BufRead as _, BufReader},
    path::Path,
    sync::OnceLock,
};

use super::{KernelError, NetnsCookie, btf::Btf, pins};

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
    /// Read once: a kernel's own layout never changes while it runs.
    pub fn of_this_kernel() -> Result<&'static Self, KernelError> {
        static FOUND: OnceLock<Offsets> = OnceLock::new();
        if let Some(found) = FOUND.get() {
            return Ok(found);
        }
        let read = Self::read()?;
        Ok(FOUND.get_or_init(|| read))
    }

    fn read() -> Result<Self, KernelError> {
        let btf = Btf::of_this_kernel()?;
        let mut globals = vec![
            (
                "TCP_WRITE_SEQ_OFFSET",
                btf.offset("tcp_sock", &["write_seq"], 4)?,
            ),
            // A `tcp_sock` begins with a `sock`.
            ("SOCK_ERROR_OFFSET", btf.offset("sock", &["sk_err"], 4)?),
            (
                "SOCK_FLAGS_OFFSET",
                btf.offset("sock", &["__sk_common", "skc_flags"], 8)?,
            ),
            ("DONE_FLAG", btf.enumerator("sock_flags", "SOCK_DONE")?),
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
    let locks = btf.bit("sock", &["sk_userlocks"])?;
    let [thread_waits, epoll_waits] = symbols(["woken_wake_function", "ep_poll_callback"])?;
    // Since 6.13 a count of those beside the first.
    let (holders, one_holder) = match btf.offset("file", &["f_ref", "refcnt", "counter"], 8) {
        Ok(at) => (at, 0),
        Err(_) => (btf.offset("file", &["f_count", "counter"], 8)?, 1),
    };
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
        ("FILE_HOLDERS_OFFSET", holders),
        ("FILE_ONE_HOLDER", one_holder),
        (
            "SOCK_PROTOCOL_OFFSET",
            sock(&["__sk_common", "skc_prot"], 8)?,
        ),
        (
            "PROTOCOL_MEMORY_OFFSET",
            btf.offset("proto", &["memory_allocated"], 8)?,
        ),
        (
            "PROTOCOL_LIMITS_OFFSET",
            btf.offset("proto", &["sysctl_mem"], 8)?,
        ),
        ("SOCK_LOCKS_OFFSET", locks / 8),
        ("SOCK_LOCKS_SHIFT", locks % 8),
        (
            "ZERO_COPY_FLAG",
            btf.enumerator("sock_flags", "SOCK_ZEROCOPY")?,
        ),
        ("SOCK_USER_DATA_OFFSET", sock(&["sk_user_data"], 8)?),
        (
            "PSOCK_INGRESS_OFFSET",
            btf.offset("sk_psock", &["ingress_msg", "next"], 8)?,
        ),
        ("SOCK_WAIT_OFFSET", sock(&["sk_wq"], 8)?),
        (
            "WAIT_HEAD_OFFSET",
            btf.offset("socket_wq", &["wait", "head", "next"], 8)?,
        ),
        (
            "WAITER_FUNCTION_OFFSET",
            btf.offset("wait_queue_entry", &["func"], 8)?,
        ),
        (
            "WAITER_NEXT_OFFSET",
            btf.offset("wait_queue_entry", &["entry", "next"], 8)?,
        ),
        ("THREAD_WAITS", thread_waits),
        ("EPOLL_WAITS", epoll_waits),
        (
            "SOCK_NET_OFFSET",
            sock(&["__sk_common", "skc_net", "net"], 8)?,
        ),
        ("NET_COOKIE_OFFSET", btf.offset("net", &["net_cookie"], 8)?),
        ("SOCKET_SOCK_OFFSET", btf.offset("socket", &["sk"], 8)?),
        ("SOCK_TRANSPORT_OFFSET", sock(&["sk_protocol"], 2)?),
        (
            "TASK_FILES_OFFSET",
            btf.offset("task_struct", &["files"], 8)?,
        ),
        (
            "FILES_TABLE_OFFSET",
            btf.offset("files_struct", &["fdt"], 8)?,
        ),
        ("TABLE_SIZE_OFFSET", btf.offset("fdtable", &["max_fds"], 4)?),
        ("TABLE_FILES_OFFSET", btf.offset("fdtable", &["fd"], 8)?),
        ("FILE_INODE_OFFSET", btf.offset("file", &["f_inode"], 8)?),
        (
            "FILE_PRIVATE_OFFSET",
            btf.offset("file", &["private_data"], 8)?,
        ),
        ("INODE_MODE_OFFSET", btf.offset("inode", &["i_mode"], 2)?),
        ("SHORT_LIMIT", SHORT_LIMIT),
    ])
}

/// The addresses of functions of the kernel. The file takes the kernel a while to write, so that it is read once for all of them.
fn symbols<const N: usize>(names: [&str; N]) -> Result<[u64; N], KernelError> {
    const SYMBOLS: &str = "/proc/kallsyms";
    let file = File::open(SYMBOLS).map_err(pins::failed("open", Path::new(SYMBOLS)))?;
    let mut addresses = [0; N];
    for line in BufReader::with_capacity(1 << 16, file).lines() {
        let line = line.map_err(pins::failed("read", Path::new(SYMBOLS)))?;
        let mut words = line.split_ascii_whitespace();
        let (address, _, found) = (words.next(), words.next(), words.next());
        let mut wanted = names.iter().zip(&mut addresses);
        let Some((_, slot)) = wanted.find(|(name, _)| found == Some(**name)) else {
            continue;
        };
        // Of several with one name the first, and 0 where addresses are hidden.
        if *slot == 0 {
            let address = address.and_then(|text| u64::from_str_radix(text, 16).ok());
            *slot = address.unwrap_or(0);
        }
        if !addresses.contains(&0) {
            return Ok(addresses);
        }
    }
    let hidden: Vec<&str> = names
        .into_iter()
        .zip(addresses)
        .filter_map(|(name, address)| (address == 0).then_some(name))
        .collect();
    Err(KernelError::Btf(format!(
        "does not go with {SYMBOLS}, which hides where `{}` is: set kernel.kptr_restrict to 1 or 0",
        hidden.join("` and `")
    )))
}
