//! An echo server on io_uring: every accept, receive and send of it is an operation of one ring. Called by `culvert-probe`.
#![allow(unsafe_code)]

use std::io;
use std::net::TcpListener;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use io_uring::{IoUring, opcode, squeue, types};

const ENTRIES: u32 = 1024;
/// At most one operation each, so that all of them fit into the ring.
const MOST_CONNECTIONS: usize = 1000;
const BUFFER: usize = 16 << 10;
/// Not the place of a connection.
const ACCEPT: u64 = u64::MAX;

struct Connection {
    socket: OwnedFd,
    // Stays where it is while the kernel uses it, wherever this is moved.
    buffer: Box<[u8; BUFFER]>,
    length: usize,
    sent: usize,
}

/// Echoes until the ring itself fails.
pub fn echo(listener: &TcpListener) -> io::Result<()> {
    let mut ring = IoUring::new(ENTRIES)?;
    let mut connections: Vec<Option<Connection>> = Vec::new();
    accept(&mut ring, listener)?;
    loop {
        ring.submit_and_wait(1)?;
        let ended: Vec<_> = ring
            .completion()
            .map(|end| (end.user_data(), end.result()))
            .collect();
        for (place, result) in ended {
            if place == ACCEPT {
                if let Ok(socket) = count(result) {
                    // SAFETY: the ring has just accepted it for us, and nobody else knows of it.
                    let socket = unsafe { OwnedFd::from_raw_fd(socket as i32) };
                    enter(&mut ring, &mut connections, socket)?;
                }
                accept(&mut ring, listener)?;
            } else {
                go_on(&mut ring, &mut connections, place, count(result))?;
            }
        }
    }
}

fn count(result: i32) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result))
}

fn accept(ring: &mut IoUring, listener: &TcpListener) -> io::Result<()> {
    let listener = types::Fd(listener.as_raw_fd());
    let operation = opcode::Accept::new(listener, std::ptr::null_mut(), std::ptr::null_mut());
    push(ring, &operation.build().user_data(ACCEPT))
}

fn enter(
    ring: &mut IoUring,
    connections: &mut Vec<Option<Connection>>,
    socket: OwnedFd,
) -> io::Result<()> {
    let free = connections.iter().position(Option::is_none);
    let place = free.unwrap_or(connections.len());
    if place >= MOST_CONNECTIONS {
        return Ok(());
    }
    if place == connections.len() {
        connections.push(None);
    }
    let connection = Connection {
        socket,
        buffer: Box::new([0; BUFFER]),
        length: 0,
        sent: 0,
    };
    if let Some(free) = connections.get_mut(place) {
        receive(ring, free.insert(connection), place as u64)?;
    }
    Ok(())
}

/// After an operation of a connection: what is left is sent, and then there is more to receive.
fn go_on(
    ring: &mut IoUring,
    connections: &mut [Option<Connection>],
    place: u64,
    outcome: io::Result<usize>,
) -> io::Result<()> {
    let Some(slot) = usize::try_from(place)
        .ok()
        .and_then(|at| connections.get_mut(at))
    else {
        return Ok(());
    };
    let Some(connection) = slot else {
        return Ok(());
    };
    match outcome {
        Ok(0) => *slot = None,
        Ok(count) => {
            if connection.length == 0 {
                connection.length = count;
            } else {
                connection.sent += count;
            }
            if connection.sent < connection.length {
                return send(ring, connection, place);
            }
            (connection.length, connection.sent) = (0, 0);
            return receive(ring, connection, place);
        }
        Err(error) => {
            eprintln!("a connection ended: {error}");
            *slot = None;
        }
    }
    Ok(())
}

fn receive(ring: &mut IoUring, connection: &mut Connection, place: u64) -> io::Result<()> {
    let socket = types::Fd(connection.socket.as_raw_fd());
    let operation = opcode::Recv::new(socket, connection.buffer.as_mut_ptr(), BUFFER as u32);
    push(ring, &operation.build().user_data(place))
}

fn send(ring: &mut IoUring, connection: &mut Connection, place: u64) -> io::Result<()> {
    let socket = types::Fd(connection.socket.as_raw_fd());
    let rest = connection
        .buffer
        .get(connection.sent..connection.length)
        .unwrap_or_default();
    let operation = opcode::Send::new(socket, rest.as_ptr(), rest.len() as u32);
    push(
        ring,
        &operation.flags(libc::MSG_NOSIGNAL).build().user_data(place),
    )
}

fn push(ring: &mut IoUring, operation: &squeue::Entry) -> io::Result<()> {
    // SAFETY: a connection has one operation at a time, and it and its buffer go only when that has ended; the listener lives
    // longer than the ring.
    if unsafe { ring.submission().push(operation) }.is_err() {
        ring.submit()?;
        // SAFETY: as above.
        unsafe { ring.submission().push(operation) }.map_err(io::Error::other)?;
    }
    Ok(())
}
