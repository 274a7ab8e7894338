//! Short-circuited flows: what one end sends goes straight into the other end's receive queue.

use crate::FlowKey;

/// Storage of a socket that is in `SHORT_SOCKETS`, where its key is the socket's cookie. It lives and dies with the socket, so
/// that what is decided by is never another connection's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct ShortEnd {
    /// Where the flow is counted.
    pub flow: FlowKey,
    /// Address of the peer's socket in the kernel. It may be somebody else's memory by now: what is read there counts only with the
    /// peer's cookie.
    pub peer: u64,
    pub peer_cookie: u64,
    /// An index of [`ShortFlow::sides`].
    pub side: u32,
    /// Non-zero once messages may be redirected.
    pub live: u32,
    /// With [`ShortEnd::SETTLED`] set, below it the `write_seq` up to which the peer was seen to have read everything, with nobody
    /// in the middle of reading.
    pub settled: u64,
    /// Where the kernel counts the memory that TCP uses, and up to how much of it bytes are redirected, in pages; in a request 0 for
    /// as much as is right.
    pub memory: u64,
    pub memory_most: u64,
}

impl ShortEnd {
    pub const SETTLED: u64 = 1 << 32;
}

macro_rules! kept {
    ($($(#[doc = $doc:literal])+ $id:ident = $number:literal $name:literal;)*) => {
        /// Why a message went by TCP: an index of [`ShortSide::by_tcp`].
        pub mod kept {
            $($(#[doc = $doc])+ pub const $id: u32 = $number;)*
            pub const COUNT: usize = ALL.len();
            /// Each by its number: its name in metrics, and what it means.
            pub const ALL: &[(&str, &str)] = &[$(($name, concat!($($doc),+))),*];
            const NUMBERS: &[u32] = &[$($number),*];
            const _: () = {
                let mut index = 0;
                while index < COUNT {
                    assert!(NUMBERS[index] == index as u32);
                    index += 1;
                }
            };
        }
    };
}
kept! {
    /// Redirecting has not begun, or was ended.
    NOT_LIVE = 0 "not_live";
    /// One of the two sockets is not plain TCP any more.
    CHANGED = 1 "changed";
    /// The peer is gone, or one direction is closed.
    NOT_ESTABLISHED = 2 "not_established";
    /// The peer has not read all that came by TCP.
    UNREAD = 3 "unread";
    /// As much as the peer may have unread is unread.
    FULL = 4 "full";
    /// The node is short of memory for TCP.
    PRESSURE = 5 "pressure";
    /// The peer reads in a way that does not see redirected bytes (blocking, with a low-water mark, by splice(2)), or its receive buffer may not grow, so that what comes by TCP would find no room beside them.
    READER = 6 "reader";
    /// The peer has left the map.
    LEFT = 7 "left";
}

/// What one end has sent since the flow was entered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct ShortSide {
    /// Bytes, and in how many messages.
    pub redirected: u64,
    pub messages: u64,
    /// Messages by TCP, for each reason.
    pub by_tcp: [u64; kept::COUNT],
    /// Bytes of those.
    pub tcp_bytes: u64,
    /// When the last message was redirected, `CLOCK_MONOTONIC` ns.
    pub last_ns: u64,
    /// This end reads in ways that do not see redirected bytes: bits of [`unfit`].
    pub unfit: u32,
    pub padding: u32,
}

/// A flow whose sockets are in `SHORT_SOCKETS`: the client's side, then the server's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct ShortFlow {
    pub sides: [ShortSide; 2],
    /// Cookies of the sockets, in the same order.
    pub sockets: [u64; 2],
}

/// What a socket in `SHORT_SOCKETS` is an end of; the key is its cookie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct ShortName {
    pub flow: FlowKey,
    pub sequence: u32,
    /// An index of [`ShortFlow::sides`].
    pub side: u32,
}

/// How a pod reads that must not be short-circuited.
pub mod unfit {
    /// splice(2) or sendfile(2) from a socket.
    pub const SPLICES: u32 = 1;
    /// FIONREAD on a socket.
    pub const ASKS: u32 = 2;
    /// SO_ZEROCOPY: whoever waits to be told that nothing was copied waits for ever.
    pub const ZERO_COPIES: u32 = 4;
}

/// What the agent is told of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Candidate {
    pub flow: FlowKey,
    pub sequence: u32,
    /// One of [`news`].
    pub news: u32,
}

pub mod news {
    /// It has carried enough to be worth a short-circuit.
    pub const WORTH: u32 = 0;
    /// Its client's end waits for, or looks for, what it cannot see: redirected bytes. The server's end.
    pub const STUCK_CLIENT: u32 = 1;
    pub const STUCK_SERVER: u32 = 2;
}

/// What the agent asks `short_request` to do with one end of a flow, in the namespace that this is in; the answer takes its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct ShortRequest {
    pub end: ShortEnd,
    /// Of the socket that is meant.
    pub cookie: u64,
    /// One of [`step`].
    pub step: u32,
    pub padding: u32,
    /// Answer: the socket's address in the kernel.
    pub socket: u64,
}

pub mod step {
    /// Is the socket fit?
    pub const EXAMINE: u32 = 0;
    /// Put it into the map; nothing is redirected yet.
    pub const ENTER: u32 = 1;
    /// Let it redirect: nobody reads from the peer who began before that was in the map.
    pub const START: u32 = 2;
    /// It redirects no more.
    pub const STOP: u32 = 3;
    /// Are redirected bytes unread? [`fit::YES`] if not, [`fit::BUSY`] if so.
    pub const LOOK: u32 = 4;
}

/// What `short_request` returns.
pub mod fit {
    pub const YES: u32 = 0;
    /// There is no such socket any more.
    pub const GONE: u32 = 1;
    pub const NOT_ESTABLISHED: u32 = 2;
    /// TLS in the kernel, or another protocol on top of TCP.
    pub const UPPER_LAYER: u32 = 3;
    pub const MULTIPATH: u32 = 4;
    /// Not O_NONBLOCK, or a thread waits in a call that began when it was not.
    pub const BLOCKING: u32 = 5;
    /// SO_RCVLOWAT is set.
    pub const LOW_WATER: u32 = 6;
    /// The kernel does not take it.
    pub const REFUSED: u32 = 7;
    /// Somebody is using the peer at this moment: to be asked again.
    pub const BUSY: u32 = 8;
    /// The request was not understood.
    pub const MALFORMED: u32 = 9;
    /// SO_RCVBUF is set.
    pub const RECEIVE_BUFFER: u32 = 10;
    /// SO_ZEROCOPY is set.
    pub const ZERO_COPY: u32 = 11;
}
