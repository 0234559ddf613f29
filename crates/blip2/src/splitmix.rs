//! SplitMix64 (Steele, Lea & Flood, OOPSLA 2014), of which all random numbers of this project are made.
//!
//! Number `i` of the stream of a seed is `mix(seed + i * GAMMA)`: a stream has no history, so any number of it is found again
//! from the seed and its place.

/// 2⁶⁴ divided by the golden ratio: the distance between neighbours of a stream. Its multiples spread over all 64 bits.
pub const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

/// The output function: neighbours become numbers that have nothing to do with each other.
pub fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
