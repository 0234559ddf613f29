//! The coefficients of a scan.

use super::huffman::{Bits, Code, Decoder};
use super::markers::{Component, Frame, Reader, Scan, ZIGZAG};
use super::{Block, JpegError};

/// How much of its coefficients a file has told.
#[derive(Debug)]
pub(super) struct Known {
    /// For each component and coefficient, in the order of the file: the lowest bit that is known.
    pub(super) bits: Vec<[Option<u32>; 64]>,
}

impl Known {
    pub(super) fn new(n_components: usize) -> Self {
        Self { bits: vec![[None; 64]; n_components] }
    }

    /// Notes what a scan tells.
    pub(super) fn see(&mut self, frame: &Frame, scan: &Scan) {
        let (from, to) = if frame.is_progressive { (scan.from, scan.to) } else { (0, 63) };
        for part in &scan.parts {
            self.bits[part.component][from..=to].fill(Some(scan.bit));
        }
    }
}

/// Decodes one scan.
pub(super) struct Entropy<'a> {
    bits: Bits<'a>,
    frame: &'a Frame,
    scan: &'a Scan,
    /// Of each of the scan's parts, where the scan needs it.
    dc: Vec<Option<Decoder>>,
    ac: Vec<Option<Decoder>>,
    /// The last DC coefficients, from which the next ones differ.
    last: [i32; 4],
    /// Blocks that are still to be passed over, because the rest of their band is zero.
    zero_blocks: u32,
    restart_interval: usize,
    until_restart: usize,
    next_restart: u8,
    /// Whether the data ran out: what follows stays zero until the next restart marker.
    is_short: bool,
}

impl<'a> Entropy<'a> {
    pub(super) fn new<'b: 'a>(
        reader: &Reader<'b>,
        frame: &'a Frame,
        scan: &'a Scan,
    ) -> Result<Self, JpegError> {
        let is_progressive = frame.is_progressive;
        let (has_dc, has_ac) =
            if is_progressive { (scan.from == 0 && scan.known_to == 0, scan.from > 0) } else { (true, true) };
        let missing = JpegError::Damaged("a Huffman table is missing");
        let (mut dc, mut ac) = (Vec::new(), Vec::new());
        for part in &scan.parts {
            let code = |codes: &[Option<Code>; 4], index, is_dc| {
                Decoder::new(codes.get(index).and_then(Option::as_ref).ok_or(missing)?, is_dc)
            };
            dc.push(has_dc.then(|| code(&reader.dc, part.dc, true)).transpose()?);
            ac.push(has_ac.then(|| code(&reader.ac, part.ac, false)).transpose()?);
        }
        Ok(Self {
            bits: Bits::new(reader.bytes, reader.at),
            frame,
            scan,
            dc,
            ac,
            last: [0; 4],
            zero_blocks: 0,
            restart_interval: reader.restart_interval,
            until_restart: reader.restart_interval,
            next_restart: 0,
            is_short: false,
        })
    }

    /// Where the scan's data end.
    pub(super) fn at(&self) -> usize {
        self.bits.at()
    }

    /// Before every MCU: takes the restart marker if one is due.
    #[inline(always)]
    fn restart_if_due(&mut self) {
        if self.restart_interval > 0 {
            if self.until_restart == 0 {
                self.restart();
            }
            self.until_restart -= 1;
        }
    }

    #[cold]
    fn restart(&mut self) {
        if self.bits.restart(self.next_restart) {
            self.is_short = false;
        }
        self.next_restart = (self.next_restart + 1) & 7;
        self.last = [0; 4];
        self.zero_blocks = 0;
        self.until_restart = self.restart_interval;
    }

    fn check_end(&self) -> Result<(), JpegError> {
        if self.bits.is_at_end() && self.bits.is_short() { Err(JpegError::Truncated) } else { Ok(()) }
    }

    /// Decodes a row of MCUs of a sequential scan with all components; `blocks` are those of each part, zero before.
    pub(super) fn sequential_row(&mut self, row: usize, blocks: &mut [Vec<Block>]) -> Result<(), JpegError> {
        if self.scan.parts.len() == 1 {
            // A scan of one component has no MCUs, and no blocks to fill them.
            let part = &self.frame.components[self.scan.parts[0].component];
            let rows = part.height.div_ceil(8).saturating_sub(row * part.down).min(part.down);
            for blocks in blocks[0].chunks_exact_mut(part.blocks_across).take(rows) {
                for block in &mut blocks[..part.width.div_ceil(8)] {
                    self.restart_if_due();
                    if !self.is_short {
                        self.sequential_block(0, block);
                        self.is_short = self.bits.is_short();
                    }
                }
            }
            return self.check_end();
        }
        for column in 0..self.frame.mcus_across {
            self.restart_if_due();
            if self.is_short {
                continue;
            }
            for (index, blocks) in blocks.iter_mut().enumerate() {
                let part = &self.frame.components[self.scan.parts[index].component];
                for down in 0..part.down {
                    for across in 0..part.across {
                        let at = down * part.blocks_across + column * part.across + across;
                        self.sequential_block(index, &mut blocks[at]);
                    }
                }
            }
            self.is_short = self.bits.is_short();
        }
        self.check_end()
    }

    /// Decodes one scan of several into all components' blocks.
    pub(super) fn whole_scan(&mut self, coefficients: &mut [Vec<Block>]) -> Result<(), JpegError> {
        let (frame, scan) = (self.frame, self.scan);
        let decode = match (frame.is_progressive, scan.from, scan.known_to) {
            (false, ..) => Self::sequential_block_again,
            (true, 0, 0) => Self::first_dc,
            (true, 0, _) => Self::next_dc,
            (true, _, 0) => Self::first_ac,
            (true, ..) => Self::next_ac,
        };
        if let [part] = &scan.parts[..] {
            let blocks = &mut coefficients[part.component];
            let part = &frame.components[part.component];
            for blocks in blocks.chunks_exact_mut(part.blocks_across).take(part.height.div_ceil(8)) {
                for block in &mut blocks[..part.width.div_ceil(8)] {
                    self.restart_if_due();
                    if !self.is_short {
                        decode(self, 0, block);
                        self.is_short = self.bits.is_short();
                    }
                }
                self.check_end()?;
            }
            return Ok(());
        }
        for row in 0..frame.mcus_down {
            for column in 0..frame.mcus_across {
                self.restart_if_due();
                if self.is_short {
                    continue;
                }
                for (index, part) in scan.parts.iter().enumerate() {
                    let blocks = &mut coefficients[part.component];
                    let part: &Component = &frame.components[part.component];
                    for down in 0..part.down {
                        for across in 0..part.across {
                            let at =
                                (row * part.down + down) * part.blocks_across + column * part.across + across;
                            decode(self, index, &mut blocks[at]);
                        }
                    }
                }
                self.is_short = self.bits.is_short();
            }
            self.check_end()?;
        }
        Ok(())
    }

    fn sequential_block_again(&mut self, index: usize, block: &mut Block) {
        self.sequential_block(index, block);
    }

    #[inline(always)]
    fn sequential_block(&mut self, index: usize, block: &mut Block) {
        let (Some(dc), Some(ac)) = (&self.dc[index], &self.ac[index]) else { return };
        let mut bits = self.bits;
        let (_, difference) = dc.symbol_and_value(&mut bits);
        self.last[index] = self.last[index].wrapping_add(difference);
        block[0] = self.last[index] as i16;
        let mut at = 1;
        while at < 64 {
            let (symbol, value) = ac.symbol_and_value(&mut bits);
            at += (symbol >> 4) as usize;
            if symbol & 15 != 0 {
                block[usize::from(ZIGZAG[at & 127]) & 63] = value as i16;
            } else if symbol >> 4 != 15 {
                break;
            }
            at += 1;
        }
        self.bits = bits;
    }

    fn first_dc(&mut self, index: usize, block: &mut Block) {
        let Some(dc) = &self.dc[index] else { return };
        let (_, difference) = dc.symbol_and_value(&mut self.bits);
        self.last[index] = self.last[index].wrapping_add(difference);
        block[0] = (self.last[index] << self.scan.bit) as i16;
    }

    fn next_dc(&mut self, _: usize, block: &mut Block) {
        if self.bits.bit() {
            block[0] |= 1 << self.scan.bit;
        }
    }

    /// The run of blocks that a symbol without a value stands for, this block included.
    fn run_of_zero_blocks(bits: &mut Bits, exponent: u32) -> u32 {
        bits.refill();
        (1 << exponent) + if exponent > 0 { bits.take(exponent) } else { 0 }
    }

    fn first_ac(&mut self, index: usize, block: &mut Block) {
        if self.zero_blocks > 0 {
            self.zero_blocks -= 1;
            return;
        }
        let Some(ac) = &self.ac[index] else { return };
        let (to, bit) = (self.scan.to, self.scan.bit);
        let mut bits = self.bits;
        let mut at = self.scan.from;
        while at <= to {
            let (symbol, value) = ac.symbol_and_value(&mut bits);
            let run = symbol >> 4;
            at += run as usize;
            if symbol & 15 != 0 {
                block[usize::from(ZIGZAG[at & 127]) & 63] = (value << bit) as i16;
            } else if run != 15 {
                self.zero_blocks = Self::run_of_zero_blocks(&mut bits, run) - 1;
                break;
            }
            at += 1;
        }
        self.bits = bits;
    }

    fn next_ac(&mut self, index: usize, block: &mut Block) {
        let Some(ac) = &self.ac[index] else { return };
        let (to, one) = (self.scan.to, 1_i16 << self.scan.bit);
        let mut bits = self.bits;
        let mut at = self.scan.from;
        // A coefficient that is not zero has a bit here, whatever the run passes it for.
        let refine = |bits: &mut Bits, coefficient: &mut i16| {
            if bits.bit() && *coefficient & one == 0 {
                *coefficient = coefficient.wrapping_add(if *coefficient >= 0 { one } else { -one });
            }
        };
        if self.zero_blocks == 0 {
            while at <= to {
                bits.refill();
                let symbol = ac.symbol(&mut bits);
                let mut run = symbol >> 4;
                let mut value = 0;
                if symbol & 15 != 0 {
                    value = if bits.bit() { one } else { -one };
                } else if run != 15 {
                    self.zero_blocks = Self::run_of_zero_blocks(&mut bits, run);
                    break;
                }
                while at <= to {
                    let coefficient = &mut block[usize::from(ZIGZAG[at]) & 63];
                    if *coefficient != 0 {
                        refine(&mut bits, coefficient);
                    } else if run == 0 {
                        break;
                    } else {
                        run -= 1;
                    }
                    at += 1;
                }
                if value != 0 {
                    block[usize::from(ZIGZAG[at]) & 63] = value;
                }
                at += 1;
            }
        }
        if self.zero_blocks > 0 {
            for &place in ZIGZAG.get(at..=to).unwrap_or_default() {
                let coefficient = &mut block[usize::from(place) & 63];
                if *coefficient != 0 {
                    refine(&mut bits, coefficient);
                }
            }
            self.zero_blocks -= 1;
        }
        self.bits = bits;
    }
}
