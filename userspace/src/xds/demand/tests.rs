use super::super::session::ResourceType;
use super::*;

fn removed(name: &str) -> Taken {
    Taken {
        kind: ResourceType::Address,
        nonce: String::new(),
        removed: vec![name.to_owned()],
        accepted: Vec::new(),
        refused: Vec::new(),
    }
}

#[tokio::test]
async fn who_asks_waits_for_the_answer_and_the_next_one_does_not() {
    let (demand, mut demanded) = Demand::new(Arc::new(Store::new()));
    let ip: IpAddr = [10, 0, 0, 1].into();
    let asking = tokio::spawn({
        let demand = demand.clone();
        async move { demand.address("net", ip).await }
    });
    let name = demanded.asks.recv().await.unwrap();
    assert_eq!(name, "net/10.0.0.1");
    assert!(!asking.is_finished());
    demanded.answers.hear(&removed(&name));
    assert_eq!(asking.await.unwrap(), Ok(()));
    assert_eq!(demand.address("net", ip).await, Ok(()));
    assert!(demanded.asks.try_recv().is_err());
}

#[tokio::test]
async fn without_an_answer_it_is_not_known() {
    let (mut demand, _demanded) = Demand::new(Arc::new(Store::new()));
    demand.patience = Duration::from_millis(10);
    let answer = demand.address("", [10, 0, 0, 1].into()).await;
    assert_eq!(answer, Err(DemandError::Deadline));
}

#[tokio::test]
async fn the_names_are_bounded() {
    let (demand, mut demanded) = Demand::new(Arc::new(Store::new()));
    for number in 0..MOST_NAMES {
        assert!(demand.ask(&number.to_string(), MOST_NAMES).is_ok());
        demanded.asks.try_recv().unwrap();
    }
    let answer = demand.address("", [10, 0, 0, 1].into()).await;
    assert_eq!(answer, Err(DemandError::TooMany));
}

#[tokio::test]
async fn what_pods_connect_to_takes_no_room_from_the_node_s_own_pods() {
    let (mut demand, mut demanded) = Demand::new(Arc::new(Store::new()));
    for number in 0..MOST_NAMES {
        demanded.answers.enter(&number.to_string(), MOST_NAMES);
    }
    let own: [IpAddr; 2] = [[10, 0, 0, 1].into(), [10, 0, 0, 2].into()];
    let asking = tokio::spawn({
        let demand = demand.clone();
        async move { demand.own_addresses("net", &own).await }
    });
    for ip in own {
        let name = demanded.asks.recv().await.unwrap();
        assert_eq!(name, format!("net/{ip}"));
        assert!(!demand.knows("net", ip) && !asking.is_finished());
        demanded.answers.hear(&removed(&name));
        assert!(demand.knows("net", ip));
    }
    asking.await.unwrap();
    // Nobody waits for ever, nor twice for what is known.
    demand.patience = Duration::from_millis(10);
    let other = [10, 0, 0, 3].into();
    demand.own_addresses("net", &[own[0], other]).await;
    assert!(!demand.knows("net", other));
    assert_eq!(demanded.asks.try_recv().unwrap(), "net/10.0.0.3");
    assert!(demanded.asks.try_recv().is_err());
}

#[tokio::test]
async fn while_nobody_takes_names_no_connection_waits_for_ever_and_the_next_one_asks_again() {
    let (mut demand, mut demanded) = Demand::new(Arc::new(Store::new()));
    demand.patience = Duration::from_millis(1);
    for number in 0..WAITING {
        demand.asks.try_send(number.to_string()).unwrap();
    }
    let ip: IpAddr = [10, 0, 0, 1].into();
    assert_eq!(demand.address("", ip).await, Err(DemandError::Deadline));
    while demanded.asks.try_recv().is_ok() {}
    assert_eq!(demand.address("", ip).await, Err(DemandError::Deadline));
    assert_eq!(demanded.asks.try_recv().unwrap(), "/10.0.0.1");
}
