//! Makes sure that a new interface is heard on the bridge it was joined to. A bridge port passes frames only some time after it
//! is up, and what is sent before is lost, to be sent again a second later. The announcement also tells everyone on the
//! link who has the address now, if another had it before. Called by `node` and `pod`.

use std::io;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::netns::Netns;
use crate::packet::{
    Arp, BROADCAST, LARGEST_FRAME, Mac, PacketSocket, arp, arp_frame, hardware_address,
};
use crate::patience::stretch;

const TIMEOUT: Duration = Duration::from_secs(5);
const FIRST_PAUSE: Duration = Duration::from_millis(1);

/// An interface in a namespace.
pub(crate) type Place<'a> = (&'a Netns, &'a str);

/// Announces `address` from `speaker` until `listener` hears it.
pub(crate) fn announce(speaker: Place, listener: Place, address: Ipv4Addr) -> Result<()> {
    let open = |(netns, interface): Place| -> Result<(PacketSocket, Mac)> {
        let both =
            || Ok::<_, io::Error>((PacketSocket::open(interface)?, hardware_address(interface)?));
        netns
            .enter(both)?
            .with_context(|| format!("opening {interface} of {}", netns.name()))
    };
    let (hears, _) = open(listener)?;
    let (speaks, mac) = open(speaker)?;
    let message = Arp {
        request: true,
        sender: (mac, address),
        target: ([0; 6], address),
    };
    let frame = arp_frame(BROADCAST, message);
    let deadline = Instant::now() + stretch(TIMEOUT);
    let mut pause = FIRST_PAUSE;
    let mut buffer = vec![0; LARGEST_FRAME];
    while Instant::now() < deadline {
        // Until the link is up, sending is an error: try again.
        let sent = speaks.send(&frame);
        let next = Instant::now() + pause;
        while sent.is_ok() && hears.wait(next)? {
            while let Some(frame) = hears.receive(&mut buffer)? {
                if arp(frame) == Some(message) {
                    // Closing a packet socket waits for an RCU grace period, 10 ms and more: nobody needs to wait along.
                    std::thread::spawn(move || drop((hears, speaks)));
                    return Ok(());
                }
            }
        }
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
        pause *= 2;
    }
    bail!(
        "{} of {} is not heard on {} of {}",
        speaker.1,
        speaker.0.name(),
        listener.1,
        listener.0.name()
    )
}
