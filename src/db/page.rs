//! Pages of rows.

/// The maximum size of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageBounds {
    pub rows_max: usize,
    pub bytes_max: usize,
}

/// Some rows, and whether more follow.
#[derive(Clone, Debug)]
pub struct Page<T> {
    pub items: Vec<T>,
    pub more: bool,
}
