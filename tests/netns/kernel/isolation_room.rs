//! Isolated sockets of clients and of servers have a table each: what fills one leaves the other end of connections protected.
//! Without the agent, which would destroy what could not be isolated.

use anyhow::Result;
use culvert_tests::scene::Scene;

use crate::{
    admission::{Impostor, MARKER},
    forgery::race_without_the_agent,
    full_tables::fill_isolated,
};

const CLIENTS: &str = "ISOLATED_CLIENTS";
const SERVERS: &str = "ISOLATED_SERVERS";

#[test]
fn a_server_s_end_is_mute_when_there_is_no_room_for_clients_ends() -> Result<()> {
    let scene = Scene::new()?;
    let _filled = fill_isolated(&scene, CLIENTS)?;
    let forgery = race_without_the_agent(&scene)?;
    assert_eq!(forgery.wire["syn_ack"], true, "{}", forgery.wire);
    forgery.was_not_read();
    Ok(())
}

#[test]
fn twin_without_room_for_servers_ends_a_spoofed_source_is_read() -> Result<()> {
    let scene = Scene::new()?;
    let _filled = fill_isolated(&scene, SERVERS)?;
    let forgery = race_without_the_agent(&scene)?;
    assert!(forgery.was_answered(), "{}", forgery.wire);
    Ok(())
}

#[test]
fn a_client_s_end_is_mute_when_there_is_no_room_for_servers_ends() -> Result<()> {
    let scene = Scene::new()?;
    let _filled = fill_isolated(&scene, SERVERS)?;
    let impostor = Impostor::meets_the_client(&scene, false)?;
    assert_eq!(impostor.read()?, 0, "{}", impostor.report);
    Ok(())
}

#[test]
fn twin_without_room_for_clients_ends_an_impostor_reads_everything() -> Result<()> {
    let scene = Scene::new()?;
    let _filled = fill_isolated(&scene, CLIENTS)?;
    let impostor = Impostor::meets_the_client(&scene, false)?;
    assert_eq!(impostor.read()?, MARKER.len() as u64, "{}", impostor.report);
    Ok(())
}
