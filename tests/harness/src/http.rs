//! A request or two to the agent's HTTP endpoints, from inside its namespace. Called by `agent`.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::netns::Netns;
use crate::patience::stretch;

const MOST_BYTES: u64 = 256 << 20;

/// An answer.
#[derive(Clone, Debug)]
pub struct Response {
    /// The status code.
    pub status: u16,
    /// The body, read to the end of the connection.
    pub body: String,
}

/// Sends one request without a body and reads the answer; `timeout` is for each step.
pub fn request(
    netns: &Netns,
    method: &str,
    to: SocketAddr,
    path: &str,
    timeout: Duration,
) -> Result<Response> {
    let timeout = stretch(timeout);
    let exchange = || -> Result<Vec<u8>> {
        let mut stream = TcpStream::connect_timeout(&to, timeout)?;
        stream.set_read_timeout(Some(timeout))?;
        stream.set_write_timeout(Some(timeout))?;
        // HTTP/1.0: the answer is neither chunked nor kept open.
        write!(
            stream,
            "{method} {path} HTTP/1.0\r\nHost: {to}\r\nContent-Length: 0\r\n\r\n"
        )?;
        let mut answer = Vec::new();
        stream.take(MOST_BYTES).read_to_end(&mut answer)?;
        Ok(answer)
    };
    let answer = netns
        .enter(exchange)?
        .with_context(|| format!("{method} http://{to}{path} in {}", netns.name()))?;
    parse(&answer).with_context(|| format!("the answer to {method} http://{to}{path}"))
}

fn parse(answer: &[u8]) -> Result<Response> {
    let text = String::from_utf8_lossy(answer);
    let (head, body) = text.split_once("\r\n\r\n").context("no end of headers")?;
    let mut first = head.lines().next().unwrap_or_default().split(' ');
    ensure!(
        first
            .next()
            .is_some_and(|version| version.starts_with("HTTP/1.")),
        "not HTTP/1: {head}"
    );
    let status = first
        .next()
        .and_then(|code| code.parse().ok())
        .with_context(|| format!("no status in {head}"))?;
    Ok(Response {
        status,
        body: body.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_parsed_and_others_refused() {
        let response = parse(b"HTTP/1.0 200 OK\r\nA: b\r\n\r\nbody\r\n\r\nmore").unwrap();
        assert_eq!(
            (response.status, response.body.as_str()),
            (200, "body\r\n\r\nmore")
        );
        for wrong in [
            "",
            "HTTP/1.1 200 OK\r\n",
            "SSH-2.0\r\n\r\n",
            "HTTP/1.1 abc\r\n\r\n",
            "HTTP/1.1\r\n\r\n",
        ] {
            assert!(parse(wrong.as_bytes()).is_err(), "{wrong:?}");
        }
    }
}
