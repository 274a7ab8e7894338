//! Against the kernel's own sockets, in this process's namespace; as root, like the agent.

use std::{
    io::{ErrorKind, Write as _},
    net::{TcpListener, TcpStream},
};

use socket2::SockRef;

use super::*;

struct Pair {
    client: TcpStream,
    server: TcpStream,
}

impl Pair {
    fn connected(listener: &TcpListener) -> Self {
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let server = listener.accept().unwrap().0;
        Self { client, server }
    }

    fn client_name(&self) -> SocketName {
        SocketName {
            local: self.client.local_addr().unwrap(),
            remote: self.client.peer_addr().unwrap(),
            cookie: SockRef::from(&self.client).cookie().unwrap(),
        }
    }
}

fn diag() -> SocketDiag {
    SocketDiag::new(&Netns::open(Path::new("/proc/self/ns/net")).unwrap()).unwrap()
}

fn pairs(count: usize) -> Vec<Pair> {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    (0..count).map(|_| Pair::connected(&listener)).collect()
}

#[test]
fn more_than_a_batch_is_destroyed_and_both_ends_are_reset() {
    let diag = diag();
    let pairs = pairs(BATCH + 3);
    let (spared, doomed) = pairs.split_last().unwrap();
    let names: Vec<_> = doomed.iter().map(Pair::client_name).collect();
    assert_eq!(diag.destroy(&names), vec![Fate::Destroyed; names.len()]);
    assert_eq!(diag.destroy(&names), vec![Fate::Gone; names.len()]);
    for pair in doomed {
        let mut byte = [0];
        for end in [&pair.client, &pair.server] {
            let error = (&*end).read(&mut byte).unwrap_err();
            assert!(
                [ErrorKind::ConnectionReset, ErrorKind::ConnectionAborted].contains(&error.kind()),
                "{error}"
            );
        }
    }
    (&spared.client).write_all(b"x").unwrap();
    assert_eq!((&spared.server).read(&mut [0]).unwrap(), 1);
}

#[test]
fn a_cookie_that_is_not_the_sockets_harms_nobody() {
    let pair = pairs(1).remove(0);
    let mut name = pair.client_name();
    name.cookie ^= 1 << 40;
    assert_eq!(diag().destroy(&[name]), [Fate::Gone]);
    let mut seen = 0;
    diag().measure(&[name], |_, _| seen += 1).unwrap();
    assert_eq!(seen, 0);
    (&pair.client).write_all(b"x").unwrap();
    assert_eq!((&pair.server).read(&mut [0]).unwrap(), 1);
}

#[test]
fn each_socket_is_measured_by_itself_and_absent_ones_are_left_out() {
    let diag = diag();
    let pairs = pairs(BATCH + 10);
    for (number, pair) in pairs.iter().enumerate() {
        (&pair.client).write_all(&vec![0; number + 1]).unwrap();
        let mut received = vec![0; number + 1];
        (&pair.server).read_exact(&mut received).unwrap();
    }
    let mut names: Vec<_> = pairs.iter().map(Pair::client_name).collect();
    names[5].cookie += 1;
    let mut seen = vec![None; names.len()];
    diag.measure(&names, |index, measures| seen[index] = Some(measures))
        .unwrap();
    assert_eq!(seen[5], None);
    let last = seen[names.len() - 1].unwrap();
    // The acknowledgement may still be on its way; the SYN counts as one.
    assert!(last.established && (1..=names.len() as u64 + 1).contains(&last.bytes_acked));
    assert_eq!(seen.iter().flatten().count(), names.len() - 1);
}
