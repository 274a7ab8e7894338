//! Against the kernel's own sockets, in this process's namespace; as root, like the agent.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    path::Path,
    sync::mpsc::{Receiver, Sender, channel},
    time::{Duration, Instant},
};

use socket2::SockRef;

use super::{
    lane::{BATCH, Exchange},
    *,
};
use crate::kernel::NetnsCookie;

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

/// With what must outlive it.
fn diag() -> (SocketDiag, Arc<DiagThreads>) {
    let threads = DiagThreads::new();
    let own = Netns::open(Path::new("/proc/self/ns/net")).unwrap();
    (SocketDiag::new(&own, "own", &threads).unwrap(), threads)
}

fn pairs(count: usize) -> Vec<Pair> {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    (0..count).map(|_| Pair::connected(&listener)).collect()
}

#[test]
fn more_than_a_batch_is_destroyed_and_both_ends_are_reset() {
    let (diag, _threads) = diag();
    let pairs = pairs(BATCH + 3);
    let (spared, doomed) = pairs.split_last().unwrap();
    let names: Vec<_> = doomed.iter().map(Pair::client_name).collect();
    assert_eq!(
        diag.destroy(names.clone()).wait().unwrap(),
        vec![Fate::Destroyed; names.len()]
    );
    assert_eq!(
        diag.destroy(names.clone()).wait().unwrap(),
        vec![Fate::Gone; names.len()]
    );
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
    let (diag, _threads) = diag();
    assert_eq!(diag.destroy(vec![name]).wait().unwrap(), [Fate::Gone]);
    assert_eq!(diag.measure(vec![name]).wait().unwrap(), []);
    (&pair.client).write_all(b"x").unwrap();
    assert_eq!((&pair.server).read(&mut [0]).unwrap(), 1);
}

#[test]
fn each_socket_is_measured_by_itself_and_absent_ones_are_left_out() {
    let (diag, _threads) = diag();
    let pairs = pairs(BATCH + 10);
    for (number, pair) in pairs.iter().enumerate() {
        (&pair.client).write_all(&vec![0; number + 1]).unwrap();
        let mut received = vec![0; number + 1];
        (&pair.server).read_exact(&mut received).unwrap();
    }
    let mut names: Vec<_> = pairs.iter().map(Pair::client_name).collect();
    names[5].cookie += 1;
    let mut seen = vec![None; names.len()];
    for (index, measures) in diag.measure(names.clone()).wait().unwrap() {
        seen[index] = Some(measures);
    }
    assert_eq!(seen[5], None);
    let last = seen[names.len() - 1].unwrap();
    // The acknowledgement may still be on its way; the SYN counts as one.
    assert!(last.established && (1..=names.len() as u64 + 1).contains(&last.bytes_acked));
    assert_eq!(seen.iter().flatten().count(), names.len() - 1);
}

/// A kernel that answers when it is told to.
struct Blocking {
    asked: Sender<usize>,
    go_on: Receiver<()>,
}

impl Exchange for Blocking {
    fn destroy(&mut self, sockets: &[SocketName]) -> Vec<Fate> {
        let _ = self.asked.send(sockets.len());
        let _ = self.go_on.recv();
        vec![Fate::Destroyed; sockets.len()]
    }

    fn measure(&mut self, _: &[SocketName]) -> std::io::Result<Vec<(usize, SocketMeasures)>> {
        let _ = self.asked.send(0);
        let _ = self.go_on.recv();
        Ok(Vec::new())
    }
}

struct Stage {
    lane: Arc<Lane>,
    asked: Receiver<usize>,
    go_on: Sender<()>,
}

fn blocking(threads: &DiagThreads, netns: u64) -> Stage {
    let (asked, was_asked) = channel();
    let (go_on, may_go_on) = channel();
    let exchange = Blocking {
        asked,
        go_on: may_go_on,
    };
    let lane = threads.lane(NetnsCookie(netns), "a-pod", || Ok(exchange));
    Stage {
        lane: lane.unwrap(),
        asked: was_asked,
        go_on,
    }
}

fn name(cookie: u64) -> SocketName {
    let nobody = "127.0.0.1:1".parse().unwrap();
    SocketName {
        local: nobody,
        remote: nobody,
        cookie,
    }
}

fn impatient() -> Arc<DiagThreads> {
    DiagThreads::with_deadline(Duration::from_millis(20))
}

/// A machine that is busy with something else may seem stuck for a moment.
fn eventually(mut ask: impl FnMut() -> Option<Vec<Fate>>) -> Vec<Fate> {
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
    }
}

/// Until the thread that was stuck has said that it is back.
fn wait_until_found(threads: &DiagThreads) {
    while threads.stuck() > 0 {
        std::thread::yield_now();
    }
}

#[test]
fn a_kernel_that_does_not_answer_is_waited_for_once_and_then_refused_at_once() {
    let threads = impatient();
    let stage = blocking(&threads, 1);
    assert_eq!(stage.lane.destroy(vec![name(1)]).wait(), None);
    assert_eq!(threads.stuck(), 1);
    assert_eq!(stage.asked.recv(), Ok(1));
    // Without waiting, and without asking the kernel.
    for _ in 0..1000 {
        let now = Instant::now();
        assert_eq!(
            stage.lane.destroy(vec![name(2)]).wait_until(now),
            Outcome::Lost
        );
        assert_eq!(stage.lane.measure(vec![name(2)]).wait(), None);
    }
    assert!(stage.asked.try_recv().is_err());
}

#[test]
fn a_namespace_that_comes_back_is_asked_again_and_what_was_not_waited_for_is_done() {
    let threads = impatient();
    let stage = blocking(&threads, 1);
    assert_eq!(stage.lane.destroy(vec![name(1)]).wait(), None);
    stage.lane.destroy_soon(name(2));
    stage.lane.destroy_soon(name(3));
    assert_eq!(stage.asked.recv(), Ok(1));
    stage.go_on.send(()).unwrap();
    assert_eq!(stage.asked.recv(), Ok(2), "what nobody waits for");
    stage.go_on.send(()).unwrap();
    wait_until_found(&threads);
    let answer = eventually(|| {
        stage.go_on.send(()).unwrap();
        stage.lane.destroy(vec![name(4)]).wait()
    });
    assert_eq!(answer, [Fate::Destroyed]);
}

#[test]
fn a_stuck_namespace_holds_no_other_up() {
    let threads = impatient();
    // More of them than threads that are not stuck.
    let stuck: Vec<Stage> = (1..=100).map(|netns| blocking(&threads, netns)).collect();
    for stage in &stuck {
        assert_eq!(stage.lane.destroy(vec![name(1)]).wait(), None);
    }
    assert_eq!(threads.stuck(), stuck.len());
    let well = blocking(&threads, 1000);
    let answer = eventually(|| {
        for _ in 0..3 {
            well.go_on.send(()).unwrap();
        }
        well.lane.destroy(vec![name(1); 2 * BATCH + 1]).wait()
    });
    assert_eq!(answer.len(), 2 * BATCH + 1);
}

#[test]
fn all_threads_stuck_at_once_are_replaced_for_those_that_wait() {
    let threads = impatient();
    let stuck: Vec<Stage> = (1..=100).map(|netns| blocking(&threads, netns)).collect();
    let asked: Vec<_> = stuck
        .iter()
        .map(|stage| stage.lane.destroy(vec![name(1)]))
        .collect();
    for asked in asked {
        assert_eq!(asked.wait(), None);
    }
    let well = blocking(&threads, 1000);
    // It may have to wait for its turn until threads are given up.
    let answer = eventually(|| {
        for stage in &stuck {
            let _ = stage.lane.measure(vec![name(1)]).wait();
        }
        well.go_on.send(()).unwrap();
        well.lane.destroy(vec![name(1)]).wait()
    });
    assert_eq!(answer, [Fate::Destroyed]);
}

#[test]
fn a_namespace_has_one_stuck_thread_whoever_opens_it_again() {
    let threads = impatient();
    let first = blocking(&threads, 7);
    assert_eq!(first.lane.destroy(vec![name(1)]).wait(), None);
    drop(first.lane);
    let again = blocking(&threads, 7);
    assert_eq!(again.lane.destroy(vec![name(1)]).wait(), None);
    assert_eq!(threads.stuck(), 1);
    assert!(again.asked.try_recv().is_err());
}

#[test]
fn destroying_does_not_wait_for_the_rest_of_a_long_look() {
    let threads = DiagThreads::with_deadline(Duration::from_secs(600));
    let stage = blocking(&threads, 1);
    let look = stage.lane.measure(vec![name(1); 3 * BATCH]);
    assert_eq!(stage.asked.recv(), Ok(0));
    let cut = stage.lane.destroy(vec![name(2)]);
    for expected in [1, 0, 0] {
        stage.go_on.send(()).unwrap();
        assert_eq!(stage.asked.recv(), Ok(expected));
    }
    assert_eq!(cut.wait(), Some(vec![Fate::Destroyed]));
    stage.go_on.send(()).unwrap();
    assert_eq!(look.wait(), Some(Vec::new()));
}
