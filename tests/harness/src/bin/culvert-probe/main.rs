//! A small program to run inside pods: servers, load, single connections step by step, and crafted packets.
//! It reports as lines of JSON on standard output; errors of the network are results, named by errno, not failures.

mod alternate;
mod burst;
mod connect;
mod crowd;
mod early;
mod fill;
mod greet;
mod late;
mod load;
mod many;
mod paced;
mod pattern;
mod raw;
mod report;
mod ring;
mod sequences;
mod serve;
mod stall;
mod starved;
mod waiting;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(about = "Servers, load and probes to run inside a test pod; reports as JSON lines")]
struct Arguments {
    #[command(subcommand)]
    probe: Probe,
}

#[derive(Subcommand)]
enum Probe {
    /// Accept TCP connections and tell what happens on each
    Serve(serve::Arguments),
    /// Measure the latency of requests and answers of equal size (server: echo)
    Rr(load::RequestResponse),
    /// Push bytes to a server that answers how many came (server: sink, or collect with --verify)
    Stream(load::Stream),
    /// Measure new connections, each with one byte there and back (server: once, or echo with --client-closes)
    Conn(load::Connections),
    /// Keep many connections busy until standard input ends, and compare every byte (server: echo)
    Crowd(crowd::Crowd),
    /// Make connections one after the other until standard input ends (server: echo)
    Churn(crowd::Churn),
    /// Make connections at a steady pace, judged by what standard input says is expected (server: echo)
    Paced(paced::Paced),
    /// Accept connections and say a name on each
    Greet(greet::Greet),
    /// Make connections and count the names they meet (server: greet)
    Meet(greet::Meet),
    /// Keep many connections, each with a byte there and back now and then; a line on standard input asks how they are
    Many(many::Client),
    /// The other end of many connections
    ServeMany(many::Server),
    /// Begin many connections at once, and keep what came of them until standard input ends
    Burst(burst::Burst),
    /// Connect to two servers in turn until standard input ends, and tell when their answers change (server: once)
    Alternate(alternate::Alternate),
    /// Echo, by io_uring alone
    ServeRing(ring::Arguments),
    /// Make random calls at both ends of connections, and tell what came of each
    Sequences(sequences::Sequences),
    /// Write on many connections that nobody reads until nothing more is taken, then read and compare all of it
    Fill(fill::Fill),
    /// Use a connection for a while, and then read otherwise
    Late(late::Late),
    /// Wait for a byte on a connection that is used meanwhile
    Early(early::Early),
    /// Begin to read, and get no processor to go on for a while
    Starved(starved::Starved),
    /// Make one connection and tell the outcome of every step
    Connect(connect::Arguments),
    /// Make one connection and keep the kernel busy with it until standard input ends
    Stall(stall::Stall),
    /// Make a socket and give it to whoever asks for it
    Offer(connect::Offer),
    /// Send SYNs with any source and sequence number, and look no further
    RawSyn(raw::Syn),
    /// Carry out a handshake by hand, with a chosen source and sequence number
    RawHandshake(raw::Handshake),
}

fn main() -> anyhow::Result<()> {
    match Arguments::parse().probe {
        Probe::Serve(arguments) => serve::run(arguments),
        Probe::Rr(arguments) => load::request_response(&arguments),
        Probe::Stream(arguments) => load::stream(&arguments),
        Probe::Conn(arguments) => load::connections(&arguments),
        Probe::Crowd(arguments) => crowd::crowd(&arguments),
        Probe::Churn(arguments) => crowd::churn(&arguments),
        Probe::Paced(arguments) => paced::paced(&arguments),
        Probe::Greet(arguments) => greet::greet(&arguments),
        Probe::Meet(arguments) => greet::meet(&arguments),
        Probe::Many(arguments) => many::client(&arguments),
        Probe::ServeMany(arguments) => many::server(&arguments),
        Probe::Burst(arguments) => burst::burst(&arguments),
        Probe::Alternate(arguments) => alternate::alternate(&arguments),
        Probe::ServeRing(arguments) => ring::serve(&arguments),
        Probe::Sequences(arguments) => sequences::sequences(&arguments),
        Probe::Fill(arguments) => fill::fill(&arguments),
        Probe::Late(arguments) => late::late(&arguments),
        Probe::Early(arguments) => early::early(&arguments),
        Probe::Starved(arguments) => starved::starved(&arguments),
        Probe::Connect(arguments) => connect::run(&arguments),
        Probe::Stall(arguments) => stall::stall(&arguments),
        Probe::Offer(arguments) => connect::offer(&arguments),
        Probe::RawSyn(arguments) => raw::syn(&arguments),
        Probe::RawHandshake(arguments) => raw::handshake(&arguments),
    }
}
