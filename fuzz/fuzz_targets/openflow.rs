//! A controller that says anything: sound messages with changes, or any bytes.
#![no_main]

use std::sync::Arc;
use std::time::Duration;

use arbitrary::Arbitrary;
use blanket_overlay::drops::Reason;
use blanket_overlay::flow::openflow::{Datapath, Description, PortInfo, Session};
use blanket_overlay::flow::text::{no_names, parse_flow};
use blanket_overlay::flow::{Action, Connections, Control, Filter, Packet, Pipeline, Sink, Target};
use blanket_overlay::frame::{Frame, Head, Key, Offload, PortId, parse};
use libfuzzer_sys::fuzz_target;

struct Switch {
    control: Control,
    pipeline: Pipeline,
}

struct Nobody;

impl Sink for Nobody {
    fn send(&mut self, _: Target, packet: &Packet<'_, '_>) {
        assert!(!packet.frame.is_empty());
    }

    fn dropped(&mut self, _: Reason, _: &Packet<'_, '_>) {}
}

impl Datapath for Switch {
    fn now(&self) -> Duration {
        Duration::from_secs(1)
    }

    fn id(&self) -> u64 {
        1
    }

    fn description(&self) -> Description {
        Description::default()
    }

    fn ports(&self) -> Vec<PortInfo> {
        vec![PortInfo {
            id: PortId(1),
            ..PortInfo::default()
        }]
    }

    fn control(&mut self) -> &mut Control {
        &mut self.control
    }

    fn packet_out(&mut self, port: Option<PortId>, actions: &[Action], bytes: &[u8]) {
        let mut frame = Frame {
            head: Head::of(bytes),
            body: &[],
            offload: Offload::default(),
        };
        let port = port.unwrap_or_default();
        let len = frame.len();
        let Ok((key, layers)) = parse(frame.head.bytes(), len, port, Default::default()) else {
            return;
        };
        let mut packet = Packet {
            frame: &mut frame,
            key,
            layers,
        };
        self.control.publish();
        self.pipeline.tick(Duration::from_secs(1));
        self.pipeline
            .run_actions(Duration::from_secs(1), actions, &mut packet, &mut Nobody);
    }

    fn set_down(&mut self, _: PortId, down: bool) -> bool {
        down
    }
}

#[derive(Arbitrary, Debug)]
enum Input {
    /// A message with a sound header.
    Message { kind: u8, body: Vec<u8> },
    /// Any bytes.
    Bytes(Vec<u8>),
}

fn message(kind: u8, body: &[u8]) -> Vec<u8> {
    let len = u16::try_from(body.len() + 8).unwrap_or(u16::MAX);
    let mut bytes = vec![4, kind % 31];
    bytes.extend(len.to_be_bytes());
    bytes.extend([0, 0, 0, 1]);
    bytes.extend(&body[..usize::from(len) - 8]);
    bytes
}

fuzz_target!(|inputs: Vec<Input>| {
    let control = Control::bridging();
    let pipeline = Pipeline::new(control.shared(), Arc::new(Connections::new(100, 10)), 16);
    let mut switch = Switch { control, pipeline };
    let mut session = Session::new();
    let mut live = session.on_bytes(&message(0, &[]), &mut switch).is_ok();
    assert!(live);
    for input in inputs.into_iter().take(64) {
        let bytes = match input {
            Input::Message { kind, body } => message(kind, &body),
            Input::Bytes(bytes) => bytes,
        };
        live = live && session.on_bytes(&bytes, &mut switch).is_ok();
        for event in session.take_events() {
            session.on_event(&event);
        }
        // What is said is sound messages.
        let mut said = session.output();
        while let [version, _, high, low, ..] = *said {
            let len = usize::from(u16::from_be_bytes([high, low]));
            assert!(version == 4 && (8..=said.len()).contains(&len));
            said = &said[len..];
        }
        assert!(said.is_empty());
        session.sent(usize::MAX);
    }
    // What was added can be written and read, and classifies.
    for entry in switch.control.select(&Filter::default()) {
        let text = entry.flow.to_string();
        let again = parse_flow(&text, &no_names).map(|flow| flow.matches);
        assert_eq!(again, Ok(entry.flow.matches), "{text}");
    }
    switch.pipeline.tick(Duration::from_secs(2));
    switch
        .pipeline
        .classify(Duration::from_secs(2), &Key::default(), 60);
});
