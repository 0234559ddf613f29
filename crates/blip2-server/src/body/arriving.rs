//! A body's bytes as they arrive, packed or not: what they unpack to is what counts, before it takes memory.

use std::io::{self, Write};

use axum::http::HeaderMap;
use axum::http::header::CONTENT_ENCODING;
use flate2::write::GzDecoder;
use tokio::sync::OwnedSemaphorePermit;

use super::{Budget, Memory, PERMIT_BYTES, RequestBody};
use crate::error::ApiError;

/// A body of which pieces come.
pub(super) enum Arriving {
    Plain(Room),
    /// And how many packed bytes may still come: some unpack to nothing, without end.
    Packed(Box<GzDecoder<Room>>, usize),
}

impl Arriving {
    pub(super) fn new(headers: &HeaderMap, limit: usize, budget: &Budget) -> Result<Self, ApiError> {
        let room = Room { bytes: Vec::new(), memory: None, limit, budget: budget.clone(), refused: None };
        let mut encodings = headers.get_all(CONTENT_ENCODING).iter();
        let encoding = match (encodings.next(), encodings.next()) {
            (None, _) => return Ok(Self::Plain(room)),
            (Some(encoding), None) => encoding.to_str().unwrap_or("unknown").trim().to_ascii_lowercase(),
            _ => return Err(ApiError::unknown_encoding()),
        };
        match encoding.as_str() {
            "" | "identity" => Ok(Self::Plain(room)),
            "gzip" | "x-gzip" => Ok(Self::Packed(Box::new(GzDecoder::new(room)), limit)),
            _ => Err(ApiError::unknown_encoding()),
        }
    }

    pub(super) fn add(&mut self, data: &[u8]) -> Result<(), ApiError> {
        match self {
            Self::Plain(room) => room.add(data),
            Self::Packed(packed, n_left) => {
                let Some(n) = n_left.checked_sub(data.len()) else {
                    return Err(ApiError::body_too_large(packed.get_ref().limit));
                };
                *n_left = n;
                packed.write_all(data).map_err(|_| packed.get_ref().why())
            }
        }
    }

    /// The whole body, now that nothing more comes.
    pub(super) fn finish(self) -> Result<RequestBody, ApiError> {
        let Room { bytes, memory, .. } = match self {
            Self::Plain(room) => room,
            Self::Packed(mut packed, _) => {
                packed.try_finish().map_err(|_| packed.get_ref().why())?;
                packed.finish().map_err(|_| ApiError::internal())?
            }
        };
        Ok(RequestBody { bytes, memory: Memory { _permit: memory } })
    }
}

/// Room for the bytes of one body: its limit, and a share of all bodies' memory that grows with them.
pub(super) struct Room {
    bytes: Vec<u8>,
    memory: Option<OwnedSemaphorePermit>,
    limit: usize,
    budget: Budget,
    /// Why there was none for what was unpacked.
    refused: Option<ApiError>,
}

impl Room {
    fn add(&mut self, data: &[u8]) -> Result<(), ApiError> {
        if self.bytes.len() + data.len() > self.limit {
            return Err(ApiError::body_too_large(self.limit));
        }
        // Vectors grow by doubling, so that much is what they may hold.
        let wanted = (2 * (self.bytes.len() + data.len())).div_ceil(PERMIT_BYTES);
        let held = self.memory.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        if let Some(missing) = wanted.checked_sub(held).filter(|missing| *missing > 0) {
            let Some(more) = self.budget.try_take(missing) else { return Err(ApiError::overloaded()) };
            match &mut self.memory {
                Some(memory) => memory.merge(more),
                None => self.memory = Some(more),
            }
        }
        self.bytes.extend_from_slice(data);
        Ok(())
    }

    /// Why unpacking failed: a lack of room, or the packed bytes themselves.
    fn why(&self) -> ApiError {
        let damaged = || ApiError::body("the request's body is not the gzip that its content-encoding says");
        self.refused.clone().unwrap_or_else(damaged)
    }
}

impl Write for Room {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        // Unpacking tries once more as it is dropped.
        if self.refused.is_none() {
            self.refused = self.add(data).err();
        }
        if self.refused.is_some() { Err(io::ErrorKind::OutOfMemory.into()) } else { Ok(data.len()) }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use flate2::Compression;
    use flate2::write::GzEncoder;

    use super::*;

    fn packed(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(bytes).expect("packed");
        encoder.finish().expect("packed")
    }

    fn arriving(encoding: &'static str, limit: usize, budget: &Budget) -> Result<Arriving, ApiError> {
        let headers = [(CONTENT_ENCODING, encoding.parse().expect("a value"))].into_iter().collect();
        Arriving::new(&headers, limit, budget)
    }

    fn unpack(sent: &[u8], limit: usize, budget: &Budget) -> Result<Vec<u8>, ApiError> {
        let mut arriving = arriving("GZIP", limit, budget)?;
        for piece in sent.chunks(7) {
            arriving.add(piece)?;
        }
        Ok(arriving.finish()?.bytes)
    }

    #[test]
    fn what_is_packed_comes_out_whole() {
        let budget = Budget::new(10 << 20);
        let bytes: Vec<u8> = (0..50_000_u32).flat_map(|i| (i * i).to_le_bytes()).collect();
        for length in [0, 1, 1000, bytes.len()] {
            assert_eq!(unpack(&packed(&bytes[..length]), 1 << 20, &budget).expect("whole"), bytes[..length]);
        }
    }

    #[test]
    fn what_unpacks_to_too_much_is_refused_before_it_takes_memory() {
        let budget = Budget::new(1 << 20);
        let bomb = packed(&vec![0; 64 << 20]);
        assert!(bomb.len() < 100_000);
        let mut arriving = arriving("gzip", 300_000, &budget).expect("gzip is known");
        assert_eq!(arriving.add(&bomb).expect_err("too large").code, "body_too_large");
        let Arriving::Packed(packed, _) = &arriving else { panic!("it is packed") };
        assert!(packed.get_ref().bytes.capacity() <= 600_000);
        drop(arriving);
        assert_eq!(unpack(&bomb, 64 << 20, &budget).expect_err("no memory").code, "server_overloaded");
        let n_free = budget.permits.available_permits();
        assert_eq!(n_free, budget.n_permits as usize, "all of it is given back");
    }

    #[test]
    fn packed_bytes_that_unpack_to_nothing_do_not_come_without_end() {
        let mut arriving = arriving("gzip", 1000, &Budget::new(1 << 20)).expect("gzip is known");
        arriving.add(b"\x1f\x8b\x08\0\0\0\0\0\0\xff").expect("the header");
        // A block that is stored as it is, of no bytes, and not the last.
        let n_taken = (0..1000).take_while(|_| arriving.add(b"\0\0\0\xff\xff").is_ok()).count();
        assert_eq!(n_taken, 198);
        assert_eq!(arriving.add(b"\0\0\0\xff\xff").expect_err("too much").code, "body_too_large");
    }

    #[test]
    fn what_is_not_gzip_is_told() {
        let budget = Budget::new(1 << 20);
        let whole = packed(b"{}");
        let mut wrong_sum = whole.clone();
        let at = wrong_sum.len() - 6;
        wrong_sum[at] ^= 1;
        let trailing = [&whole[..], b"more"].concat();
        for sent in
            [&b"{}"[..], &whole[..whole.len() - 1], &whole[..5], &wrong_sum[..], &trailing[..], &b""[..]]
        {
            let error = unpack(sent, 1 << 20, &budget).expect_err("no gzip");
            assert_eq!(error.code, "invalid_body", "{sent:?}");
        }
        for encoding in ["br", "gzip, gzip", "zstd", "deflate"] {
            let error = arriving(encoding, 9, &budget).err().expect("unknown");
            assert_eq!((error.status.as_u16(), error.code), (415, "unsupported_encoding"));
        }
        assert!(matches!(arriving("identity", 9, &budget), Ok(Arriving::Plain(_))));
    }
}
