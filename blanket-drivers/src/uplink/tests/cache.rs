//! The self-test, what it chooses, and what is kept of it.

use super::*;
use crate::uplink::selftest::judge;
use std::fs;

fn figures(bulk: f64, small: f64, trip: f64) -> Figures {
    Figures {
        bulk_gbps: bulk,
        cpu_s_per_gb: 1.0,
        small_kpps: small,
        round_trip_us: trip,
    }
}

fn measured(kind: Kind, figures: Option<Figures>) -> Measured {
    Measured {
        kind,
        mode: Some("GSO".to_owned()),
        figures,
        obstacle: None,
        score: 0.0,
    }
}

#[test]
fn the_best_all_round_is_chosen_and_of_equals_the_preferred() {
    let report = judge(vec![
        measured(Kind::Udp, Some(figures(10.0, 300.0, 20.0))),
        measured(Kind::AfXdp, Some(figures(5.0, 1200.0, 10.0))),
        // Fast, but a millisecond late.
        measured(Kind::AfPacket, Some(figures(12.0, 400.0, 1000.0))),
    ]);
    assert_eq!(report.chosen, Kind::AfXdp);
    assert!(report.kinds[2].score < report.kinds[0].score);
    let same = Some(figures(1.0, 1.0, 1.0));
    let report = judge(vec![measured(Kind::Udp, same), measured(Kind::AfXdp, same)]);
    assert_eq!(report.chosen, Kind::Udp);
    let report = judge(vec![measured(Kind::Udp, None), measured(Kind::AfXdp, None)]);
    assert_eq!(report.chosen, Kind::Udp);
    assert!(
        report.reason.contains("works everywhere"),
        "{}",
        report.reason
    );
}

#[test]
fn a_self_test_is_kept_until_something_changes_and_the_users_wish_longer() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_owned();
    in_lab(1500, 1, move |lab| {
        lab.enter(0).unwrap();
        let cache = Cache::new(&path.join("uplinks"));
        let address = Lab::address(0, 0, false);
        let (mut record, known) = cache.record("up0", address, false).unwrap();
        assert!(!known);
        assert_eq!(record.key.driver, "veth");
        let udp = record
            .report
            .kinds
            .iter()
            .find(|it| it.kind == Kind::Udp)
            .unwrap();
        let figures = udp.figures.unwrap();
        assert!(
            figures.bulk_gbps > 0.0 && figures.small_kpps > 0.0,
            "{figures:?}"
        );
        assert!(udp.obstacle.is_none());
        let (again, known) = cache.record("up0", address, false).unwrap();
        assert!(known);
        assert_eq!(again, record);

        record.wanted = Some(Kind::AfPacket);
        cache.store(&record).unwrap();
        assert_eq!(cache.load("up0").unwrap().kind(), Kind::AfPacket);
        // As if another kernel had been booted.
        record.key.kernel = "1.0".to_owned();
        cache.store(&record).unwrap();
        let (new, known) = cache.record("up0", address, false).unwrap();
        assert!(!known);
        assert_eq!(new.wanted, Some(Kind::AfPacket));

        // As if the user before had not been permitted to measure.
        record = new;
        record.report = judge(vec![measured(Kind::Udp, None)]);
        cache.store(&record).unwrap();
        assert!(!cache.record("up0", address, false).unwrap().1);

        fs::write(path.join("uplinks/up0.json"), "{\"key\": 1").unwrap();
        assert!(cache.load("up0").is_none());
        assert!(!cache.record("up0", address, false).unwrap().1);
        assert!(matches!(
            cache.record("up9", address, false),
            Err(Error::NoInterface(_))
        ));
    });
}
