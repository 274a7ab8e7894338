//! The CONNECT request, made by the client and parsed strictly by the server, and the server's answer to it.

use std::net::{IpAddr, SocketAddr};

use bytes::Bytes;
use h2::RecvStream;
use h2::server::SendResponse;
use http::uri::{Authority, Parts};
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri, Version, header,
};

use super::stream::HboneStream;

const BAGGAGE: HeaderName = HeaderName::from_static("baggage");
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// What the client asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ConnectRequest {
    /// `ip:port` of the target, or `hostname:port` towards a gateway.
    pub authority: String,
    pub forwarded: Option<String>,
    pub baggage: Option<String>,
    pub traceparent: Option<String>,
}

impl ConnectRequest {
    pub(super) fn to_http(&self) -> Result<Request<()>, http::Error> {
        let mut parts = Parts::default();
        parts.authority = Some(self.authority.parse::<Authority>()?);
        let mut request = Request::new(());
        *request.method_mut() = Method::CONNECT;
        *request.version_mut() = Version::HTTP_2;
        *request.uri_mut() = Uri::from_parts(parts)?;
        let headers = [
            (header::FORWARDED, &self.forwarded),
            (BAGGAGE, &self.baggage),
            (TRACEPARENT, &self.traceparent),
        ];
        for (name, value) in headers {
            if let Some(value) = value {
                request
                    .headers_mut()
                    .insert(name, HeaderValue::from_str(value)?);
            }
        }
        Ok(request)
    }
}

/// What a client asked the server for. Only the target was checked; the rest is the peer's claim, for logs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IncomingConnect {
    pub target: SocketAddr,
    pub forwarded: Option<String>,
    pub baggage: Option<String>,
    pub traceparent: Option<String>,
}

impl IncomingConnect {
    /// None if it is anything but a plain CONNECT to an address and port.
    pub(super) fn parse<B>(request: &Request<B>) -> Option<Self> {
        let extended = request.extensions().get::<h2::ext::Protocol>().is_some();
        if request.method() != Method::CONNECT || extended {
            return None;
        }
        let headers = request.headers();
        Some(Self {
            target: target(request.uri().authority()?.as_str())?,
            forwarded: text(headers, &header::FORWARDED),
            baggage: text(headers, &BAGGAGE),
            traceparent: text(headers, &TRACEPARENT),
        })
    }
}

/// An address and a port in their usual spelling; no names, zones, leading zeros or port 0. IPv4 in IPv6 is made IPv4, so that it is
/// compared as what it means.
fn target(authority: &str) -> Option<SocketAddr> {
    let (_, port) = authority.rsplit_once(':')?;
    if port.is_empty() || port.starts_with('0') {
        return None;
    }
    match authority.parse().ok()? {
        SocketAddr::V6(address) if address.scope_id() != 0 => None,
        address => Some(SocketAddr::new(
            IpAddr::to_canonical(&address.ip()),
            address.port(),
        )),
    }
}

fn text(headers: &HeaderMap, name: &HeaderName) -> Option<String> {
    headers.get(name)?.to_str().ok().map(str::to_owned)
}

/// Why a CONNECT is not carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// 400: not a CONNECT, a bad authority, or an address that is not this pod's.
    BadRequest,
    /// 401: policy denies.
    Denied,
    /// 503: the application cannot be reached.
    Unavailable,
}

impl Refusal {
    fn status(self) -> StatusCode {
        match self {
            Self::BadRequest => StatusCode::BAD_REQUEST,
            Self::Denied => StatusCode::UNAUTHORIZED,
            Self::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        }
    }
}

/// A CONNECT that waits for its answer. Dropped without one, it is refused with 503.
#[derive(Debug)]
pub struct Incoming {
    connect: IncomingConnect,
    waiting: Option<(SendResponse<Bytes>, RecvStream)>,
}

impl Incoming {
    pub(super) fn new(
        connect: IncomingConnect,
        respond: SendResponse<Bytes>,
        body: RecvStream,
    ) -> Self {
        Self {
            connect,
            waiting: Some((respond, body)),
        }
    }

    pub fn connect(&self) -> &IncomingConnect {
        &self.connect
    }

    /// Answers 200. Fails if the client has gone meanwhile.
    pub fn accept(mut self) -> Result<HboneStream, h2::Error> {
        let Some((mut respond, body)) = self.waiting.take() else {
            return Err(h2::Reason::INTERNAL_ERROR.into());
        };
        let send = respond.send_response(Response::new(()), false)?;
        Ok(HboneStream::new(send, body, None))
    }

    pub fn refuse(mut self, refusal: Refusal) {
        if let Some((mut respond, _)) = self.waiting.take() {
            answer(&mut respond, refusal);
        }
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if let Some((mut respond, _)) = self.waiting.take() {
            answer(&mut respond, Refusal::Unavailable);
        }
    }
}

pub(super) fn answer(respond: &mut SendResponse<Bytes>, refusal: Refusal) {
    let mut response = Response::new(());
    *response.status_mut() = refusal.status();
    // Fails only if the client has gone: then nobody waits for it.
    let _ = respond.send_response(response, true);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_an_address_and_a_port_and_nothing_else() {
        for (authority, expected) in [
            ("10.0.0.1:80", "10.0.0.1:80"),
            ("[2001:db8::1]:8080", "[2001:db8::1]:8080"),
            ("[::ffff:10.0.0.1]:80", "10.0.0.1:80"),
        ] {
            assert_eq!(
                target(authority),
                Some(expected.parse().unwrap()),
                "{authority}"
            );
        }
        for authority in [
            "",
            ":80",
            "10.0.0.1",
            "10.0.0.1:",
            "10.0.0.1:0",
            "10.0.0.1:080",
            "10.0.0.1:65536",
            "10.0.0.1:-1",
            "10.0.0.1:+80",
            "010.0.0.1:80",
            "10.1:80",
            "2001:db8::1",
            "2001:db8::1:80",
            "[2001:db8::1%1]:80",
            "[fe80::1%eth0]:80",
            "localhost:80",
            "server.shop.svc:80",
            "user@10.0.0.1:80",
            "10.0.0.1:80 ",
            "10.0.0.1:80:80",
        ] {
            assert_eq!(target(authority), None, "{authority}");
        }
    }

    #[test]
    fn what_the_client_writes_the_server_reads() {
        let request = ConnectRequest {
            authority: "10.0.0.1:80".into(),
            forwarded: Some("for=\"10.0.0.2:1234\"".into()),
            baggage: Some("k8s.namespace.name=shop".into()),
            traceparent: None,
        };
        let connect = IncomingConnect::parse(&request.to_http().unwrap()).unwrap();
        assert_eq!(connect.target, "10.0.0.1:80".parse().unwrap());
        assert_eq!(
            (connect.forwarded, connect.baggage, connect.traceparent),
            (request.forwarded, request.baggage, None)
        );
    }

    #[test]
    fn a_request_that_cannot_be_written_is_an_error() {
        let request = |authority: &str, baggage: &str| ConnectRequest {
            authority: authority.into(),
            baggage: Some(baggage.into()),
            ..ConnectRequest::default()
        };
        assert!(request("a b", "x").to_http().is_err());
        assert!(request("10.0.0.1:80", "x\r\ny: z").to_http().is_err());
    }
}
