//! The segments of a file: frame, tables, scans, and what they say about colours.

use super::JpegError;
use super::huffman::Code;
use super::standard;

// In the standard: SOF, DHT, DAC, RST, SOI, EOI, SOS, DQT, DRI, APP0, APP1, APP14, TEM.
const FRAME_FIRST: u8 = 0xc0;
const HUFFMAN_TABLES: u8 = 0xc4;
const ARITHMETIC_TABLES: u8 = 0xcc;
const RESTART_FIRST: u8 = 0xd0;
const RESTART_LAST: u8 = 0xd7;
const START: u8 = 0xd8;
const END: u8 = 0xd9;
const SCAN: u8 = 0xda;
const QUANTIZATION_TABLES: u8 = 0xdb;
const RESTART_INTERVAL: u8 = 0xdd;
const JFIF: u8 = 0xe0;
const EXIF: u8 = 0xe1;
const ADOBE: u8 = 0xee;
const TEMPORARY: u8 = 0x01;

/// Where a block's coefficients lie, in the order of the file. A damaged file's run can lead beyond the last, which is then
/// written again.
pub(super) const ZIGZAG: [u8; 128] = zigzag();

const fn zigzag() -> [u8; 128] {
    let mut order = [63; 128];
    let (mut row, mut column) = (0_i32, 0_i32);
    let mut at = 0;
    while at < 64 {
        order[at] = (8 * row + column) as u8;
        // Up and to the right on even diagonals, down and to the left on odd ones.
        if (row + column) % 2 == 0 {
            if column == 7 {
                row += 1;
            } else if row == 0 {
                column += 1;
            } else {
                row -= 1;
                column += 1;
            }
        } else if row == 7 {
            column += 1;
        } else if column == 0 {
            row += 1;
        } else {
            row += 1;
            column -= 1;
        }
        at += 1;
    }
    order
}

/// A colour channel as it is stored.
#[derive(Debug, Clone)]
pub(super) struct Component {
    id: u8,
    /// Sampling factors: its blocks in an MCU.
    pub(super) across: usize,
    pub(super) down: usize,
    quantizer: usize,
    /// Samples.
    pub(super) width: usize,
    pub(super) height: usize,
    /// Blocks, with those that fill the last MCUs.
    pub(super) blocks_across: usize,
    pub(super) blocks_down: usize,
}

/// The picture as its header describes it.
#[derive(Debug, Clone)]
pub(super) struct Frame {
    pub(super) is_progressive: bool,
    pub(super) width: usize,
    pub(super) height: usize,
    pub(super) components: Vec<Component>,
    /// The largest sampling factors.
    pub(super) across: usize,
    pub(super) down: usize,
    pub(super) mcus_across: usize,
    pub(super) mcus_down: usize,
}

/// A component in a scan, with its tables.
#[derive(Debug, Clone)]
pub(super) struct Part {
    pub(super) component: usize,
    pub(super) dc: usize,
    pub(super) ac: usize,
}

/// What a scan codes.
#[derive(Debug, Clone)]
pub(super) struct Scan {
    pub(super) parts: Vec<Part>,
    /// Of a progressive file: the coefficients from where to where, in the order of the file, ...
    pub(super) from: usize,
    pub(super) to: usize,
    /// ... the bit they were known to, zero before the first scan, and the bit they are known to after this.
    pub(super) known_to: u32,
    pub(super) bit: u32,
}

/// What the components are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Colours {
    Grey,
    Rgb,
    YCbCr,
    Cmyk,
    Ycck,
}

/// Reads one segment after another.
#[derive(Debug)]
pub(super) struct Reader<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) at: usize,
    pub(super) frame: Option<Frame>,
    pub(super) exif: Option<&'a [u8]>,
    pub(super) restart_interval: usize,
    pub(super) dc: [Option<Code<'a>>; 4],
    pub(super) ac: [Option<Code<'a>>; 4],
    quantizers: [Option<[u16; 64]>; 4],
    is_jfif: bool,
    /// What an Adobe program says it did to the colours.
    adobe: Option<u8>,
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Result<Self, JpegError> {
        if bytes.len() < 2 {
            return Err(JpegError::Truncated);
        }
        if bytes[..2] != [0xff, START] {
            return Err(JpegError::Damaged("it does not begin as a JPEG file does"));
        }
        Ok(Self {
            bytes,
            at: 2,
            frame: None,
            exif: None,
            restart_interval: 0,
            dc: [None; 4],
            ac: [None; 4],
            quantizers: [None; 4],
            is_jfif: false,
            adobe: None,
        })
    }

    /// Goes on reading from here.
    pub(super) fn seek(&mut self, at: usize) {
        self.at = at;
    }

    /// Reads on to the data of the next scan; `None` at the end marker.
    pub(super) fn next_scan(&mut self) -> Result<Option<Scan>, JpegError> {
        loop {
            match self.next_marker()? {
                END => return Ok(None),
                SCAN => return self.scan().map(Some),
                START => return Err(JpegError::Damaged("it begins twice")),
                RESTART_FIRST..=RESTART_LAST | TEMPORARY => {}
                HUFFMAN_TABLES => self.huffman_tables()?,
                ARITHMETIC_TABLES => {
                    self.segment()?;
                }
                kind @ FRAME_FIRST..=0xcf => self.frame(kind)?,
                QUANTIZATION_TABLES => self.quantization_tables()?,
                RESTART_INTERVAL => {
                    let &[high, low] = self.segment()? else { return Err(wrong_length()) };
                    self.restart_interval = usize::from(u16::from_be_bytes([high, low]));
                }
                JFIF => {
                    let segment = self.segment()?;
                    self.is_jfif |= segment.len() >= 14 && segment.starts_with(b"JFIF\0");
                }
                EXIF => {
                    let segment = self.segment()?;
                    self.exif =
                        segment.strip_prefix(b"Exif\0\0").filter(|notes| !notes.is_empty()).or(self.exif);
                }
                ADOBE => {
                    let segment = self.segment()?;
                    if segment.len() >= 12 && segment.starts_with(b"Adobe") {
                        self.adobe = Some(segment[11]);
                    }
                }
                // Comments, profiles, what other programs left.
                0xdc | 0xde | 0xdf | 0xe2..=0xef | 0xfe => {
                    self.segment()?;
                }
                _ => return Err(JpegError::Damaged("it has an unknown marker")),
            }
        }
    }

    /// Reads on to the end marker, whatever there is before it: the picture is whole without.
    pub(super) fn find_end(&mut self) -> Result<(), JpegError> {
        loop {
            match self.next_marker()? {
                END => return Ok(()),
                RESTART_FIRST..=RESTART_LAST | TEMPORARY | START => {}
                // A scan's data are passed over like what lies between segments.
                _ => {
                    self.segment()?;
                }
            }
        }
    }

    /// Takes the standard's codes where the file gave none before its first scan.
    pub(super) fn add_standard_codes(&mut self) {
        for index in 0..2 {
            self.dc[index].get_or_insert(standard::DC[index]);
            self.ac[index].get_or_insert(standard::AC[index]);
        }
    }

    /// The colours that a frame's components stand for, by libjpeg's rules.
    pub(super) fn colours(&self, frame: &Frame) -> Colours {
        let ids: Vec<u8> = frame.components.iter().map(|part| part.id).collect();
        match (frame.components.len(), self.adobe) {
            (1, _) => Colours::Grey,
            (3, Some(0)) if !self.is_jfif => Colours::Rgb,
            (3, None) if !self.is_jfif && ids == *b"RGB" => Colours::Rgb,
            (3, _) => Colours::YCbCr,
            (_, None | Some(0)) => Colours::Cmyk,
            _ => Colours::Ycck,
        }
    }

    /// The quantization tables of a scan's parts, in rows.
    pub(super) fn quantizers(&self, scan: &Scan, frame: &Frame) -> Result<Vec<[i16; 64]>, JpegError> {
        let of = |index: usize| self.quantizers[frame.components[index].quantizer];
        let tables = scan.parts.iter().map(|part| {
            let table = of(part.component).ok_or(JpegError::Damaged("a quantization table is missing"))?;
            // Sixteen bits with a sign, as libjpeg's vectors have them.
            Ok(table.map(|step| step as i16))
        });
        tables.collect()
    }

    /// On to the next marker, over whatever lies between.
    fn next_marker(&mut self) -> Result<u8, JpegError> {
        let (marker, at) = find_marker(self.bytes, self.at).ok_or(JpegError::Truncated)?;
        self.at = at;
        Ok(marker)
    }

    /// The content of the segment whose marker was read.
    fn segment(&mut self) -> Result<&'a [u8], JpegError> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let &length = rest.first_chunk().ok_or(JpegError::Truncated)?;
        // The length counts itself; libjpeg passes over smaller ones.
        let length = usize::from(u16::from_be_bytes(length)).max(2);
        let segment = rest.get(2..length).ok_or(JpegError::Truncated)?;
        self.at += length;
        Ok(segment)
    }

    fn frame(&mut self, kind: u8) -> Result<(), JpegError> {
        let segment = self.segment()?;
        let is_progressive = match kind {
            0xc0 | 0xc1 => false,
            0xc2 => true,
            0xc3 => return Err(JpegError::Unsupported("lossless")),
            0xc9..=0xcb | 0xcd..=0xcf => return Err(JpegError::Unsupported("arithmetic coding")),
            _ => return Err(JpegError::Unsupported("a hierarchy of frames")),
        };
        if self.frame.is_some() {
            return Err(JpegError::Damaged("it has two frames"));
        }
        let &[bits, height_high, height_low, width_high, width_low, n_components, ref parts @ ..] = segment
        else {
            return Err(wrong_length());
        };
        if parts.len() != 3 * usize::from(n_components) {
            return Err(wrong_length());
        }
        let width = usize::from(u16::from_be_bytes([width_high, width_low]));
        let height = usize::from(u16::from_be_bytes([height_high, height_low]));
        if width == 0 || height == 0 || n_components == 0 {
            return Err(JpegError::Damaged("it has no pixels"));
        }
        if bits != 8 {
            return Err(JpegError::Unsupported("other than 8 bits a sample"));
        }
        if !matches!(n_components, 1 | 3 | 4) {
            return Err(JpegError::Unsupported("two or more than four components"));
        }
        let parts = parts.chunks_exact(3).map(|part| {
            let (across, down) = (usize::from(part[1] >> 4), usize::from(part[1] & 15));
            (part[0], across, down, usize::from(part[2]))
        });
        let (mut most_across, mut most_down) = (1, 1);
        for (_, across, down, quantizer) in parts.clone() {
            if !(1..=4).contains(&across) || !(1..=4).contains(&down) || quantizer > 3 {
                return Err(JpegError::Damaged("a component's numbers are out of range"));
            }
            (most_across, most_down) = (most_across.max(across), most_down.max(down));
        }
        let (mcus_across, mcus_down) = (width.div_ceil(8 * most_across), height.div_ceil(8 * most_down));
        let mut components = Vec::new();
        for (id, across, down, quantizer) in parts {
            if most_across % across != 0 || most_down % down != 0 {
                return Err(JpegError::Unsupported("components of fractional sizes"));
            }
            components.push(Component {
                id,
                across,
                down,
                quantizer,
                width: (width * across).div_ceil(most_across),
                height: (height * down).div_ceil(most_down),
                blocks_across: mcus_across * across,
                blocks_down: mcus_down * down,
            });
        }
        self.frame = Some(Frame {
            is_progressive,
            width,
            height,
            components,
            across: most_across,
            down: most_down,
            mcus_across,
            mcus_down,
        });
        Ok(())
    }

    fn quantization_tables(&mut self) -> Result<(), JpegError> {
        let mut rest = self.segment()?;
        while let Some((&head, tail)) = rest.split_first() {
            let (is_wide, index) = (head >> 4 != 0, usize::from(head & 15));
            let n_bytes = if is_wide { 128 } else { 64 };
            let (Some(steps), true) = (tail.get(..n_bytes), index < 4) else { return Err(wrong_length()) };
            let mut table = [0; 64];
            for (at, &to) in ZIGZAG[..64].iter().enumerate() {
                table[usize::from(to)] = if is_wide {
                    u16::from_be_bytes([steps[2 * at], steps[2 * at + 1]])
                } else {
                    u16::from(steps[at])
                };
            }
            self.quantizers[index] = Some(table);
            rest = &tail[n_bytes..];
        }
        Ok(())
    }

    fn huffman_tables(&mut self) -> Result<(), JpegError> {
        let mut rest = self.segment()?;
        while let Some((&head, tail)) = rest.split_first() {
            let (tables, index) = match head {
                0..=3 => (&mut self.dc, head),
                0x10..=0x13 => (&mut self.ac, head - 0x10),
                _ => return Err(JpegError::Damaged("a Huffman table has an unknown place")),
            };
            let (code, after) = Code::read(tail).ok_or_else(wrong_length)?;
            tables[usize::from(index)] = Some(code);
            rest = after;
        }
        Ok(())
    }

    fn scan(&mut self) -> Result<Scan, JpegError> {
        let segment = self.segment()?;
        let frame = self.frame.as_ref().ok_or(JpegError::Damaged("a scan comes before the frame"))?;
        let (&n_parts, rest) = segment.split_first().ok_or_else(wrong_length)?;
        if !(1..=4).contains(&n_parts) || rest.len() != 2 * usize::from(n_parts) + 3 {
            return Err(wrong_length());
        }
        let (listed, numbers) = rest.split_at(rest.len() - 3);
        let mut parts: Vec<Part> = Vec::new();
        for pair in listed.chunks_exact(2) {
            // They come in the frame's order; libjpeg takes no other.
            let start = parts.last().map_or(0, |part| part.component + 1);
            let component = (start..frame.components.len())
                .find(|&index| frame.components[index].id == pair[0])
                .ok_or(JpegError::Damaged("a scan's components are not the frame's"))?;
            let (dc, ac) = (usize::from(pair[1] >> 4), usize::from(pair[1] & 15));
            parts.push(Part { component, dc, ac });
        }
        let blocks =
            |part: &Part| frame.components[part.component].across * frame.components[part.component].down;
        if parts.len() > 1 && parts.iter().map(blocks).sum::<usize>() > 10 {
            return Err(JpegError::Damaged("an MCU has more than ten blocks"));
        }
        let (from, to) = (usize::from(numbers[0]), usize::from(numbers[1]));
        let (known_to, bit) = (u32::from(numbers[2] >> 4), u32::from(numbers[2] & 15));
        if frame.is_progressive {
            let is_band = if from == 0 { to == 0 } else { (from..64).contains(&to) && parts.len() == 1 };
            if !is_band || bit > 13 || known_to != 0 && known_to != bit + 1 {
                return Err(JpegError::Damaged("a progressive scan's numbers are out of range"));
            }
        }
        Ok(Scan { parts, from, to, known_to, bit })
    }
}

/// The next marker from `at` on and where it ends. Stuffing (a zero) and fill bytes (0xff) make none.
pub(super) fn find_marker(bytes: &[u8], at: usize) -> Option<(u8, usize)> {
    let rest = bytes.get(at..)?;
    let mut searched = 0;
    loop {
        searched += rest[searched..].iter().position(|&byte| byte == 0xff)?;
        searched += rest[searched..].iter().position(|&byte| byte != 0xff)?;
        if rest[searched] != 0 {
            return Some((rest[searched], at + searched + 1));
        }
    }
}

fn wrong_length() -> JpegError {
    JpegError::Damaged("a segment has the wrong length")
}
