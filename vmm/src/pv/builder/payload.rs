//! The uncompressed kernel as a stream: out of a bzImage, or an ELF file as it is.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};

use flate2::bufread::GzDecoder;
use linux_loader::bootparam::setup_header;
use lzma_rust2::XzReader;
use vm_memory::ByteValued;
use zstd::stream::read::Decoder as ZstdDecoder;

use super::Problem;

/// Where a bzImage has its setup header (Documentation/arch/x86/boot.rst).
const SETUP_HEADER: u64 = 0x1f1;
/// The header's mark, "HdrS".
const HDRS: u32 = 0x5372_6448;
/// The protocol version that tells where the payload lies.
const PAYLOAD_VERSION: u16 = 0x208;
/// Bytes decompressed at a time: they stay in the cache.
const BUFFER: usize = 256 << 10;
/// What a decompressor may keep of what it has made, in bytes: the kernel's
/// build has xz and zstd look back 128 MiB at most.
const WINDOW: u64 = 128 << 20;

/// The decompressed kernel.
pub(super) type Stream<'a> = Box<dyn BufRead + 'a>;

/// Opens the stream at its beginning.
pub(super) fn open(file: &File) -> Result<Stream<'_>, Problem> {
    let mut reader = file;
    reader.rewind()?;
    let mut magic = [0; 4];
    if reader.read_exact(&mut magic).is_err() {
        return Err(Problem::Format("it is empty, or nearly".to_owned()));
    }
    if magic == *b"\x7fELF" {
        reader.rewind()?;
        return Ok(Box::new(BufReader::with_capacity(BUFFER, reader)));
    }
    let (at, len) = payload(file)?;
    reader.seek(SeekFrom::Start(at))?;
    decompress(BufReader::with_capacity(BUFFER, reader.take(len)))
}

/// Where the payload of a bzImage lies in its file: (offset, length).
fn payload(file: &File) -> Result<(u64, u64), Problem> {
    let none = || Problem::Format("it has neither an ELF nor a bzImage header".to_owned());
    let mut reader = file;
    let size = reader.seek(SeekFrom::End(0))?;
    let mut header = setup_header::default();
    reader.seek(SeekFrom::Start(SETUP_HEADER))?;
    reader
        .read_exact(header.as_mut_slice())
        .map_err(|_| none())?;
    if header.header != HDRS {
        return Err(none());
    }
    if header.version < PAYLOAD_VERSION {
        return Err(Problem::Format("it is older than Linux 2.6.26".to_owned()));
    }
    // The protected-mode part lies behind the boot sector and the setup code.
    let setup = (u64::from(header.setup_sects.max(1)) + 1) * 512;
    let at = setup + u64::from(header.payload_offset);
    let len = u64::from(header.payload_length);
    if at + len > size {
        let needed = at + len;
        return Err(Problem::Truncated(format!(
            "it has {size} of at least {needed} bytes"
        )));
    }
    Ok((at, len))
}

/// Finds out how the payload is compressed. Behind the compressed data, but
/// for gzip's, lie four bytes with its uncompressed size.
fn decompress<'a, R: BufRead + 'a>(mut payload: R) -> Result<Stream<'a>, Problem> {
    let start = payload.fill_buf()?;
    let magic: [u8; 4] = start
        .first_chunk()
        .copied()
        .ok_or_else(|| Problem::Format("its payload is empty".to_owned()))?;
    match magic {
        [0x7f, b'E', b'L', b'F'] => Ok(Box::new(payload)),
        [0x1f, 0x8b, ..] => Ok(buffered(GzDecoder::new(payload))),
        [0xfd, b'7', b'z', b'X'] => {
            let limit_kib = (WINDOW >> 10) as u32 + 1024;
            Ok(buffered(XzReader::new_mem_limit(payload, false, limit_kib)))
        }
        [0x28, 0xb5, 0x2f, 0xfd] => {
            let mut decoder = ZstdDecoder::with_buffer(payload)?.single_frame();
            decoder.window_log_max(WINDOW.ilog2())?;
            Ok(buffered(decoder))
        }
        Lz4Legacy::<R>::MAGIC => Ok(Box::new(Lz4Legacy::new(payload))),
        _ => Err(Problem::Format(format!(
            "its payload is compressed in a way that is not known (it starts with {magic:02x?})"
        ))),
    }
}

fn buffered<'a>(reader: impl Read + 'a) -> Stream<'a> {
    Box::new(BufReader::with_capacity(BUFFER, reader))
}

/// LZ4's legacy frame, which the kernel's build makes: blocks of 8 MiB, each
/// behind its compressed length.
struct Lz4Legacy<R> {
    input: R,
    compressed: Vec<u8>,
    block: Vec<u8>,
    /// What of `block` has not been read yet.
    rest: std::ops::Range<usize>,
}

impl<R: BufRead> Lz4Legacy<R> {
    const MAGIC: [u8; 4] = 0x184c_2102_u32.to_le_bytes();
    const BLOCK: usize = 8 << 20;

    fn new(input: R) -> Self {
        Self {
            input,
            compressed: Vec::new(),
            block: vec![0; Self::BLOCK],
            rest: 0..0,
        }
    }

    /// Decompresses the next block; without one, `rest` stays empty.
    fn next_block(&mut self) -> io::Result<()> {
        let mut word = [0; 4];
        loop {
            match self.input.read_exact(&mut word) {
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                other => other?,
            }
            if word != Self::MAGIC {
                break;
            }
        }
        let len = u32::from_le_bytes(word);
        // LZ4 makes nothing longer than this; and behind the last block lies
        // the uncompressed size, which is no block's length.
        if len as usize > Self::BLOCK + Self::BLOCK / 255 + 16 {
            return Ok(());
        }
        self.compressed.clear();
        let got = (&mut self.input)
            .take(u64::from(len))
            .read_to_end(&mut self.compressed)?;
        if got < len as usize {
            return Ok(());
        }
        let made = lz4_flex::block::decompress_into(&self.compressed, &mut self.block)
            .map_err(io::Error::other)?;
        self.rest = 0..made;
        Ok(())
    }
}

impl<R: BufRead> BufRead for Lz4Legacy<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.rest.is_empty() {
            self.next_block()?;
        }
        Ok(&self.block[self.rest.clone()])
    }

    fn consume(&mut self, amount: usize) {
        self.rest.start = (self.rest.start + amount).min(self.rest.end);
    }
}

impl<R: BufRead> Read for Lz4Legacy<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let len = self.fill_buf()?.read(out)?;
        self.consume(len);
        Ok(len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;

    fn lz4(content: &[u8]) -> Vec<u8> {
        let mut out = Lz4Legacy::<&[u8]>::MAGIC.to_vec();
        for block in content.chunks(Lz4Legacy::<&[u8]>::BLOCK) {
            let block = lz4_flex::block::compress(block);
            out.extend((block.len() as u32).to_le_bytes());
            out.extend(block);
        }
        out
    }

    fn all(payload: &[u8]) -> Result<Vec<u8>, String> {
        let mut out = Vec::new();
        let mut stream = decompress(payload).map_err(|problem| format!("{problem:?}"))?;
        stream
            .read_to_end(&mut out)
            .map_err(|error| error.to_string())?;
        Ok(out)
    }

    /// Bytes that compress, over several LZ4 blocks.
    fn content() -> Vec<u8> {
        (0..(17u32 << 20)).map(|i| (i >> 7) as u8).collect()
    }

    #[test]
    fn every_compression_of_the_kernels_build_is_undone() {
        let content = content();
        let size = (content.len() as u32).to_le_bytes();
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&content).unwrap();
        let mut xz =
            lzma_rust2::XzWriter::new(Vec::new(), lzma_rust2::XzOptions::with_preset(0)).unwrap();
        xz.write_all(&content).unwrap();
        let zstd = zstd::encode_all(content.as_slice(), 1).unwrap();
        for payload in [
            gzip.finish().unwrap(),
            [xz.finish().unwrap().as_slice(), &size].concat(),
            [zstd.as_slice(), &size].concat(),
            [lz4(&content).as_slice(), &size].concat(),
        ] {
            assert!(all(&payload).unwrap() == content, "{:x?}", &payload[..4]);
        }
    }

    #[test]
    fn an_unknown_compression_is_refused_by_its_first_bytes() {
        let error = all(b"BZh91AY&SY").unwrap_err();
        assert!(error.contains("not known"), "{error}");
    }

    proptest! {
        #[test]
        fn no_payload_makes_a_decompressor_panic_or_run_away(
            magic in prop::sample::select(vec![
                vec![0x1f, 0x8b, 8, 0],
                vec![0xfd, b'7', b'z', b'X', b'Z', 0],
                vec![0x28, 0xb5, 0x2f, 0xfd],
                Lz4Legacy::<&[u8]>::MAGIC.to_vec(),
            ]),
            rest in prop::collection::vec(any::<u8>(), 0..512),
        ) {
            let payload = [magic, rest].concat();
            if let Ok(stream) = decompress(payload.as_slice()) {
                let read = stream.take(64 << 20).read_to_end(&mut Vec::new());
                prop_assert!(read.is_err() || read.is_ok_and(|len| len <= 64 << 20));
            }
        }

        #[test]
        fn a_damaged_lz4_payload_yields_an_error_or_other_bytes_but_no_panic(
            at in 0usize..4000, value: u8, cut in 0usize..4000,
        ) {
            let content: Vec<u8> = (0..20_000u32).map(|i| (i % 251 * (i >> 9)) as u8).collect();
            let mut payload = lz4(&content);
            let at = at % payload.len();
            payload[at] = value;
            payload.truncate(payload.len().max(cut + 1) - cut);
            let _ = all(&payload);
        }
    }
}
