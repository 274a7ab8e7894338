//! Limits of HTTP/2 tunnels. The defaults are the values that peers of this protocol use, where they are visible to a peer.

use std::time::Duration;

/// What peers have for each part of a handshake.
pub const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);

const KIB: u32 = 1024;
const MIB: u32 = 1024 * KIB;

/// What one tunnel may hold.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes a peer may have under way on one stream.
    pub stream_window: u32,
    /// Bytes a peer may have under way on all streams of a tunnel.
    pub connection_window: u32,
    pub max_frame: u32,
    /// Streams a peer may have open at once.
    pub max_streams: u32,
    /// Size of all request headers, decoded. Also bounds CONTINUATION frames.
    pub max_header_list: u32,
    /// Bytes of ours that may wait on one stream for the peer's window or the socket.
    pub max_send_buffer: usize,
    /// What unread DATA frames smaller than 256 bytes may cost beyond their payload. h2 ends the whole tunnel past it. Databases send
    /// small frames, and one read of the socket can bring a receive buffer full of them before any stream is polled: this allows a
    /// quarter of a million unread ones per tunnel. `HboneStream::poll_prefetch` keeps the number low while a reader is blocked.
    pub small_frame_budget: usize,
    /// Streams that we reset and still remember, so that frames under way for them are not held against the peer.
    pub max_remembered_resets: usize,
    pub remember_resets_for: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            stream_window: 4 * MIB,
            connection_window: 16 * MIB,
            max_frame: MIB,
            max_streams: 200,
            max_header_list: 32 * KIB,
            max_send_buffer: 512 * 1024,
            small_frame_budget: 64 * 1024 * 1024,
            max_remembered_resets: 1024,
            remember_resets_for: Duration::from_secs(5),
        }
    }
}

impl Limits {
    pub(super) fn client(&self, streams: u32) -> h2::client::Builder {
        let mut builder = h2::client::Builder::new();
        builder
            .initial_window_size(self.stream_window)
            .initial_connection_window_size(self.connection_window)
            .max_frame_size(self.max_frame)
            .max_header_list_size(self.max_header_list)
            .max_send_buffer_size(self.max_send_buffer)
            .data_frame_budget(self.small_frame_budget)
            .max_concurrent_reset_streams(self.max_remembered_resets)
            .reset_stream_duration(self.remember_resets_for)
            .initial_max_send_streams(usize::try_from(streams).unwrap_or(usize::MAX))
            .enable_push(false);
        builder
    }

    pub(super) fn server(&self) -> h2::server::Builder {
        let mut builder = h2::server::Builder::new();
        builder
            .initial_window_size(self.stream_window)
            .initial_connection_window_size(self.connection_window)
            .max_frame_size(self.max_frame)
            .max_header_list_size(self.max_header_list)
            .max_send_buffer_size(self.max_send_buffer)
            .data_frame_budget(self.small_frame_budget)
            .max_concurrent_streams(self.max_streams)
            .max_concurrent_reset_streams(self.max_remembered_resets)
            .reset_stream_duration(self.remember_resets_for);
        builder
    }
}

/// The client side.
#[derive(Debug, Clone, Copy)]
pub struct PoolSettings {
    pub limits: Limits,
    /// `POOL_MAX_STREAMS_PER_CONNECTION`. A peer that allows fewer gets fewer.
    pub max_streams_per_connection: u32,
    /// TCP connect, TLS and HTTP/2 together. Without one only the first of them has a limit, of its own.
    pub handshake_deadline: Option<Duration>,
    /// From CONNECT to its answer.
    pub answer_deadline: Duration,
    /// How long a tunnel without streams is kept.
    pub idle: Duration,
}

impl Default for PoolSettings {
    fn default() -> Self {
        Self {
            limits: Limits::default(),
            max_streams_per_connection: 100,
            handshake_deadline: Some(HANDSHAKE_DEADLINE),
            answer_deadline: Duration::from_secs(20),
            idle: Duration::from_secs(60),
        }
    }
}

/// The server side.
#[derive(Debug, Clone, Copy)]
pub struct ServerSettings {
    pub limits: Limits,
    /// TLS, then the HTTP/2 preface, and then the first request must each come within this. Without one only the request has a
    /// limit, [`Self::idle`].
    pub handshake_deadline: Option<Duration>,
    /// A tunnel that had no stream for this long is closed.
    pub idle: Duration,
    /// How long streams may go on once a tunnel drains.
    pub grace: Duration,
}

impl Default for ServerSettings {
    fn default() -> Self {
        Self {
            limits: Limits::default(),
            handshake_deadline: Some(HANDSHAKE_DEADLINE),
            idle: Duration::from_secs(300),
            grace: Duration::from_secs(25),
        }
    }
}
