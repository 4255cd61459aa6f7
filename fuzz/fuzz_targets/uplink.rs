//! What uplinks read from the wire and from the kernel about it: any bytes are
//! a datagram or an error, and what was built is read back.
#![no_main]

use arbitrary::Arbitrary;
use blanket_drivers::mac::MacAddress;
use blanket_drivers::uplink::wire::{
    Checksum, End, Headers, VIRTIO_HEADER, VirtioHeader, gro_segment, parse,
};
use blanket_drivers::uplink::{Record, TxPacket};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
enum Input {
    /// A frame with a virtio header in front.
    Frame { bytes: Vec<u8>, verify: bool },
    /// A sound frame.
    Built {
        v6: bool,
        hosts: (u8, u8),
        ports: (u16, u16),
        partial: bool,
        payload: Vec<u8>,
        /// Bytes that are changed then, and how the frame is cut off.
        changes: Vec<(u16, u8)>,
        cut: Option<u16>,
    },
    /// Control messages of a received datagram.
    Control(Vec<u8>),
    /// A self-test's file.
    File(Vec<u8>),
    /// A train.
    Train { bytes: Vec<u8>, segment: u32 },
}

fn end(v6: bool, host: u8, port: u16) -> End {
    let address = if v6 {
        ([0xfd00, 0, 0, 0, 0, 0, 0, u16::from(host)], port).into()
    } else {
        ([10, 0, 0, host], port).into()
    };
    End {
        mac: MacAddress([2, 0, 0, 0, 0, host]),
        address,
    }
}

fn read(frame: &[u8], verify: bool) {
    if let Ok(datagram) = parse(frame, verify) {
        let within = frame.as_ptr_range();
        let payload = datagram.payload.as_ptr_range();
        assert!(within.start <= payload.start && payload.end <= within.end);
        assert_eq!(datagram.from.is_ipv4(), datagram.to.is_ipv4());
        // What is accepted with its checksum is accepted without a look at it.
        assert_eq!(parse(frame, false), Ok(datagram));
    }
}

fuzz_target!(|input: Input| match input {
    Input::Frame { bytes, verify } => {
        let header = VirtioHeader::parse(&bytes);
        assert!(header.is_none() || bytes.len() >= VIRTIO_HEADER);
        read(bytes.get(VIRTIO_HEADER..).unwrap_or_default(), verify);
    }
    Input::Built {
        v6,
        hosts,
        ports,
        partial,
        payload,
        changes,
        cut,
    } => {
        let (from, to) = (end(v6, hosts.0, ports.0), end(v6, hosts.1, ports.1));
        let checksum = if partial {
            Checksum::Partial
        } else {
            Checksum::Full
        };
        let headers = Headers::new(from, to, &payload, checksum).expect("it is short");
        let mut frame = [headers.as_bytes(), &payload].concat();
        let datagram = parse(&frame, true).expect("it is sound");
        assert_eq!((datagram.from, datagram.to), (from.address, to.address));
        assert_eq!(datagram.payload, payload);
        for (at, change) in changes {
            let at = usize::from(at) % frame.len();
            frame[at] ^= change;
        }
        if let Some(cut) = cut {
            frame.truncate(cut.into());
        }
        read(&frame, true);
        read(&frame, false);
    }
    Input::Control(bytes) => {
        assert!(gro_segment(&bytes).is_none_or(|segment| segment > 0));
    }
    Input::File(bytes) => {
        let _ = Record::parse(&bytes);
    }
    Input::Train { bytes, segment } => {
        let train = TxPacket::train(([10, 0, 0, 1], 1).into(), &bytes, segment as usize);
        assert_eq!(train.iter().count(), train.datagrams());
        assert_eq!(train.iter().collect::<Vec<_>>().concat(), bytes);
    }
});
