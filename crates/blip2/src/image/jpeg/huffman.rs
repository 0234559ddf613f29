//! Huffman codes and the bits they are read from.

use super::JpegError;
use super::markers::find_marker;

/// Bits that are looked up at once: most coefficients have no more, their code and their value together.
const LOOKUP: u32 = 10;

/// A code as the file gives it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Code<'a> {
    /// How many codes there are of 1 to 16 bits.
    pub(super) counts: &'a [u8; 16],
    pub(super) symbols: &'a [u8],
}

impl<'a> Code<'a> {
    /// Reads a code, and gives what follows it.
    pub(super) fn read(bytes: &'a [u8]) -> Option<(Self, &'a [u8])> {
        let (counts, rest) = bytes.split_first_chunk()?;
        let n_symbols = counts.iter().map(|&count| usize::from(count)).sum();
        let (symbols, rest) = (n_symbols <= 256).then(|| rest.split_at_checked(n_symbols))??;
        Some((Self { counts, symbols }, rest))
    }
}

/// A code made ready for decoding.
pub(super) struct Decoder {
    /// For the next bits of the file: in the lowest four how many of them are used, or none when the code is longer; whether
    /// these include the value; from the 8th the symbol; from the 16th the value.
    lookup: Box<[u32; 1 << LOOKUP]>,
    /// By length: one more than the largest code, shifted up to 16 bits; ...
    ends: [u32; 17],
    /// ... and what to add to a code for the place of its symbol.
    offsets: [i32; 17],
    symbols: [u8; 256],
}

const HAS_VALUE: u32 = 16;

impl Decoder {
    /// `is_dc` says that the symbols are lengths alone.
    pub(super) fn new(code: &Code, is_dc: bool) -> Result<Self, JpegError> {
        const BAD: JpegError = JpegError::Damaged("a Huffman table contradicts itself");
        if is_dc && code.symbols.iter().any(|&symbol| symbol > 15) {
            return Err(BAD);
        }
        let mut decoder =
            Self { lookup: Box::new([0; 1 << LOOKUP]), ends: [0; 17], offsets: [0; 17], symbols: [0; 256] };
        decoder.symbols[..code.symbols.len()].copy_from_slice(code.symbols);
        let (mut next, mut place) = (0_u32, 0_usize);
        for length in 1..=16_u32 {
            let n_codes = u32::from(code.counts[length as usize - 1]);
            decoder.offsets[length as usize] = place as i32 - next as i32;
            for _ in 0..n_codes {
                if length <= LOOKUP {
                    decoder.fill(next, length, code.symbols[place]);
                }
                (next, place) = (next + 1, place + 1);
            }
            // Bits that are all ones are no code.
            if n_codes > 0 && next >= 1 << length {
                return Err(BAD);
            }
            decoder.ends[length as usize] = if n_codes > 0 { next << (16 - length) } else { 0 };
            next <<= 1;
        }
        Ok(decoder)
    }

    /// Enters a code for whatever bits follow it.
    fn fill(&mut self, code: u32, length: u32, symbol: u8) {
        let free = LOOKUP - length;
        let size = u32::from(symbol & 15);
        for following in 0..1_u32 << free {
            let Some(entry) = self.lookup.get_mut(((code << free) + following) as usize) else { return };
            *entry = length | u32::from(symbol) << 8;
            if size > 0 && size <= free {
                let value = extend(following >> (free - size), size);
                *entry += size | HAS_VALUE | (value as u32) << 16;
            }
        }
    }

    /// A symbol whose code is longer than what is looked up.
    #[cold]
    fn long_symbol(&self, bits: &mut Bits) -> u32 {
        let next = (bits.buffer >> 48) as u32;
        for length in LOOKUP + 1..=16 {
            if next < self.ends[length as usize] {
                let place = (next >> (16 - length)) as i32 + self.offsets[length as usize];
                bits.skip(length);
                return u32::from(self.symbols[place as usize & 255]);
            }
        }
        // No code: libjpeg takes it for a zero.
        bits.skip(17);
        0
    }

    /// The next symbol. There must be 17 bits.
    #[inline(always)]
    pub(super) fn symbol(&self, bits: &mut Bits) -> u32 {
        let entry = self.lookup[(bits.buffer >> (64 - LOOKUP)) as usize];
        if entry & HAS_VALUE != 0 || entry & 15 == 0 {
            if entry == 0 {
                return self.long_symbol(bits);
            }
            let symbol = entry >> 8 & 255;
            bits.skip((entry & 15) - (symbol & 15));
            return symbol;
        }
        bits.skip(entry & 15);
        entry >> 8 & 255
    }

    /// The next symbol and the value that follows it, zero when it has none.
    #[inline(always)]
    pub(super) fn symbol_and_value(&self, bits: &mut Bits) -> (u32, i32) {
        bits.refill();
        let entry = self.lookup[(bits.buffer >> (64 - LOOKUP)) as usize];
        bits.skip(entry & 15);
        let mut symbol = entry >> 8 & 255;
        if entry & HAS_VALUE != 0 {
            return (symbol, entry as i32 >> 16);
        }
        if entry == 0 {
            symbol = self.long_symbol(bits);
        }
        let size = symbol & 15;
        if size == 0 { (symbol, 0) } else { (symbol, extend(bits.take(size), size)) }
    }
}

/// The number that `size` bits stand for: those that begin with a zero are negative.
#[inline(always)]
fn extend(bits: u32, size: u32) -> i32 {
    let bits = bits as i32;
    if bits < 1 << (size - 1) { bits - (1 << size) + 1 } else { bits }
}

/// The bits of a scan's data.
#[derive(Clone, Copy)]
pub(super) struct Bits<'a> {
    bytes: &'a [u8],
    at: usize,
    /// The next bits, from the highest down.
    buffer: u64,
    n_bits: u32,
    /// How many of them are none of the file's but zeros, for want of data.
    n_zeros: u32,
    is_at_marker: bool,
    is_at_end: bool,
}

impl<'a> Bits<'a> {
    pub(super) fn new(bytes: &'a [u8], at: usize) -> Self {
        Self { bytes, at, buffer: 0, n_bits: 0, n_zeros: 0, is_at_marker: false, is_at_end: false }
    }

    /// Where the data that were not read begin.
    pub(super) fn at(&self) -> usize {
        self.at
    }

    /// Whether bits were used that the data did not have.
    #[inline(always)]
    pub(super) fn is_short(&self) -> bool {
        self.n_zeros > self.n_bits
    }

    /// Whether the file is at its end, with no marker there.
    pub(super) fn is_at_end(&self) -> bool {
        self.is_at_end
    }

    /// Makes sure of 32 bits: a code and its value.
    #[inline(always)]
    pub(super) fn refill(&mut self) {
        if self.n_bits >= 32 {
            return;
        }
        if let Some(&next) = self.bytes.get(self.at..).and_then(<[u8]>::first_chunk) {
            let next = u64::from_be_bytes(next);
            // Whether one of the bytes is 0xff, that is whether one of the complement is zero.
            let has_marker = (!next).wrapping_sub(0x0101_0101_0101_0101) & next & 0x8080_8080_8080_8080 != 0;
            if !has_marker {
                // Bits beyond `n_bits` are there twice, and are the same.
                self.buffer |= next >> self.n_bits;
                self.at += ((63 - self.n_bits) / 8) as usize;
                self.n_bits |= 56;
                return;
            }
        }
        *self = self.refilled();
    }

    /// By bytes. In and out by value, so that the fields can be registers everywhere else.
    #[cold]
    fn refilled(mut self) -> Self {
        while self.n_bits <= 56 {
            let byte = self.next_byte();
            if byte.is_none() {
                // All there is left, and as many zeros as are asked for.
                self.n_zeros += 8;
            }
            self.buffer |= u64::from(byte.unwrap_or(0)) << (56 - self.n_bits);
            self.n_bits += 8;
        }
        self
    }

    fn next_byte(&mut self) -> Option<u8> {
        if self.is_at_marker {
            return None;
        }
        match self.bytes.get(self.at..) {
            Some(&[byte, ..]) if byte != 0xff => {
                self.at += 1;
                Some(byte)
            }
            Some(&[_, ref rest @ ..]) => {
                let n_fill = rest.iter().take_while(|&&byte| byte == 0xff).count();
                self.is_at_marker = rest.get(n_fill) != Some(&0);
                self.is_at_end = n_fill == rest.len();
                if self.is_at_marker {
                    return None;
                }
                self.at += n_fill + 2;
                Some(0xff)
            }
            None | Some([]) => {
                (self.is_at_marker, self.is_at_end) = (true, true);
                None
            }
        }
    }

    #[inline(always)]
    pub(super) fn skip(&mut self, n_bits: u32) {
        self.buffer <<= n_bits;
        self.n_bits -= n_bits;
    }

    /// The next 1 to 16 bits.
    #[inline(always)]
    pub(super) fn take(&mut self, n_bits: u32) -> u32 {
        let taken = (self.buffer >> (64 - n_bits)) as u32;
        self.skip(n_bits);
        taken
    }

    /// Whether the next bit is one.
    #[inline(always)]
    pub(super) fn bit(&mut self) -> bool {
        self.refill();
        self.take(1) == 1
    }

    /// Goes on after restart marker number `expected`, or where damage makes it likely that this would be; whether there are
    /// data for it.
    pub(super) fn restart(&mut self, expected: u8) -> bool {
        let Self { bytes, at, .. } = *self;
        let mut from = at;
        loop {
            let Some((marker, after)) = find_marker(bytes, from) else {
                *self = Self { is_at_marker: true, is_at_end: true, ..Self::new(bytes, bytes.len()) };
                return false;
            };
            // How far ahead of the expected one it is, of eight.
            let ahead = match marker {
                0xd0..=0xd7 => Some(marker.wrapping_sub(0xd0).wrapping_sub(expected) & 7),
                _ => None,
            };
            match ahead {
                // One of the next two: what lies between is lost.
                Some(1 | 2) => {}
                // One of the last two, or no marker at all: the right one comes later.
                Some(6 | 7) => {
                    from = after;
                    continue;
                }
                // The right one, or so far off that it might as well be.
                Some(_) => {
                    *self = Self::new(bytes, after);
                    return true;
                }
                None if marker < 0xc0 => {
                    from = after;
                    continue;
                }
                None => {}
            }
            // The marker stays where it is.
            let start = bytes[..after].iter().rposition(|&byte| byte == 0xff).unwrap_or(at);
            *self = Self { is_at_marker: true, ..Self::new(bytes, start) };
            return false;
        }
    }
}
