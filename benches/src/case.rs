//! What is measured: the rows of the result in their order, and the loads that give them.

/// A figure. Names never change: results of different versions are compared by them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Case {
    Rr1,
    Rr1k,
    Rr16k,
    Stream64,
    Stream1k,
    Stream16k,
    Stream128k,
    ConnClose,
    RedisGet,
    NginxKeepalive,
    CpuPerMreq,
    CpuPerGib,
    // What follows is no row.
    Rr1Apart,
    Rr1kApart,
    Rr16kApart,
    ConnBare,
    Rr1k99,
    Rr1kPerSecond,
    MachinePerMreq,
    MachinePerGib,
    CpuPerMconn,
    AgentPerMconn,
}

impl Case {
    pub const ROWS: [Self; 12] = [
        Self::Rr1,
        Self::Rr1k,
        Self::Rr16k,
        Self::Stream64,
        Self::Stream1k,
        Self::Stream16k,
        Self::Stream128k,
        Self::ConnClose,
        Self::RedisGet,
        Self::NginxKeepalive,
        Self::CpuPerMreq,
        Self::CpuPerGib,
    ];
    /// Given beside the rows, as a check on them.
    pub const BESIDE: [Self; 9] = [
        Self::Rr1k99,
        Self::Rr1Apart,
        Self::Rr1kApart,
        Self::Rr16kApart,
        Self::ConnBare,
        Self::CpuPerMconn,
        Self::AgentPerMconn,
        Self::MachinePerMreq,
        Self::MachinePerGib,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Rr1 => "rr_1",
            Self::Rr1k | Self::Rr1k99 | Self::Rr1kPerSecond => "rr_1k",
            Self::Rr16k => "rr_16k",
            Self::Rr1Apart => "rr_1_apart",
            Self::Rr1kApart => "rr_1k_apart",
            Self::Rr16kApart => "rr_16k_apart",
            Self::Stream64 => "stream_64",
            Self::Stream1k => "stream_1k",
            Self::Stream16k => "stream_16k",
            Self::Stream128k => "stream_128k",
            Self::ConnClose => "conn_close",
            Self::ConnBare => "conn_bare",
            Self::RedisGet => "redis_get",
            Self::NginxKeepalive => "nginx_keepalive",
            Self::CpuPerMreq => "cpu_per_mreq",
            Self::CpuPerGib => "cpu_per_gib",
            Self::CpuPerMconn => "cpu_per_mconn",
            Self::AgentPerMconn => "agent_cpu_per_mconn",
            Self::MachinePerMreq => "machine_cpu_per_mreq",
            Self::MachinePerGib => "machine_cpu_per_gib",
        }
    }

    /// The unit, with what it is a figure of.
    pub fn metric(self) -> &'static str {
        match self {
            Self::Rr1
            | Self::Rr1k
            | Self::Rr16k
            | Self::Rr1Apart
            | Self::Rr1kApart
            | Self::Rr16kApart => "p50_us",
            Self::Rr1k99 => "p99_us",
            Self::Stream64 | Self::Stream1k | Self::Stream16k | Self::Stream128k => "gbit_s",
            Self::ConnClose
            | Self::ConnBare
            | Self::RedisGet
            | Self::NginxKeepalive
            | Self::Rr1kPerSecond => "per_s",
            Self::CpuPerMreq
            | Self::CpuPerGib
            | Self::MachinePerMreq
            | Self::MachinePerGib
            | Self::CpuPerMconn
            | Self::AgentPerMconn => "cpu_s",
        }
    }

    /// Whether more of it is better.
    pub fn is_rate(self) -> bool {
        matches!(self.metric(), "gbit_s" | "per_s")
    }

    /// What the ratio of the direct way should be at most (times and CPU) or at least (rates).
    pub fn goal(self) -> Option<f64> {
        match self {
            Self::Rr1 | Self::Rr1k | Self::Rr16k => Some(1.03),
            Self::ConnClose => Some(0.95),
            Self::CpuPerMreq => Some(1.05),
            Self::ConnBare => None,
            case if case.is_rate() => Some(0.97),
            _ => None,
        }
    }

    /// The same of the short-circuited way.
    pub fn short_goal(self) -> Option<f64> {
        match self {
            Self::Rr1 | Self::Rr1k => Some(0.75),
            Self::Rr16k | Self::CpuPerMreq => Some(0.85),
            Self::Stream1k => Some(1.2),
            Self::Stream64 | Self::Stream16k | Self::Stream128k => Some(1.0),
            Self::ConnClose => Some(0.93),
            Self::RedisGet | Self::NginxKeepalive => Some(1.15),
            _ => None,
        }
    }
}

/// One kind of load; a slice of it gives one figure or more.
#[derive(Clone, Copy, Debug)]
pub enum Load {
    /// Requests and answers of so many bytes, one after the other on one connection. Client and server share a processor: what
    /// the way itself costs.
    Requests(u32, Case),
    /// The same between two processors, of which one always sleeps: most of the time goes into waking it.
    RequestsApart(u32, Case),
    /// One stream, written in pieces of so many bytes.
    Stream(u32, Case),
    /// HTTP with one request for each connection.
    Pages,
    /// As little as a connection can be: a byte there and back.
    Connections,
    Redis,
    Nginx,
}

impl Load {
    pub const ALL: [Self; 14] = [
        Self::Requests(1, Case::Rr1),
        Self::RR_1K,
        Self::Requests(16 << 10, Case::Rr16k),
        Self::RequestsApart(1, Case::Rr1Apart),
        Self::RequestsApart(1 << 10, Case::Rr1kApart),
        Self::RequestsApart(16 << 10, Case::Rr16kApart),
        Self::Stream(64, Case::Stream64),
        Self::Stream(1 << 10, Case::Stream1k),
        Self::Stream(16 << 10, Case::Stream16k),
        Self::STREAM_128K,
        Self::Pages,
        Self::Connections,
        Self::Redis,
        Self::Nginx,
    ];
    pub const RR_1K: Self = Self::Requests(1 << 10, Case::Rr1k);
    pub const STREAM_128K: Self = Self::Stream(128 << 10, Case::Stream128k);

    /// What one operation of it is called.
    pub fn operation(self) -> &'static str {
        match self {
            Self::Requests(..) | Self::RequestsApart(..) | Self::Redis | Self::Nginx => "request",
            Self::Stream(..) => "MiB",
            Self::Connections | Self::Pages => "connection",
        }
    }

    /// Whether the programs at both ends use sockets that do not block: no others are short-circuited.
    pub fn is_non_blocking(self) -> bool {
        !matches!(self, Self::Connections)
    }

    pub fn by_name(name: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|load| load.name() == name);
        found.ok_or_else(|| {
            let names = Self::ALL.map(Self::name);
            format!(
                "there is no load of that name; there are {}",
                names.join(", ")
            )
        })
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Requests(_, case) | Self::RequestsApart(_, case) | Self::Stream(_, case) => {
                case.name()
            }
            Self::Pages => Case::ConnClose.name(),
            Self::Connections => Case::ConnBare.name(),
            Self::Redis => Case::RedisGet.name(),
            Self::Nginx => Case::NginxKeepalive.name(),
        }
    }
}
