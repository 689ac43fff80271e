//! The columns that import reads and export writes.

/// A value of an issue that a file can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Column {
    Title,
    Description,
    Priority,
    Status,
    Assignee,
    Labels,
    ExternalId,
    CreateTime,
    CloseTime,
}

impl Column {
    /// All columns; row errors are reported in this order.
    pub const ALL: [Self; 9] = [
        Self::Title,
        Self::Description,
        Self::Priority,
        Self::Status,
        Self::Assignee,
        Self::Labels,
        Self::ExternalId,
        Self::CreateTime,
        Self::CloseTime,
    ];

    /// Returns the column's name in the header.
    pub fn name(self) -> &'static str {
        match self {
            Self::Title => "title",
            Self::Description => "description",
            Self::Priority => "priority",
            Self::Status => "status",
            Self::Assignee => "assignee",
            Self::Labels => "labels",
            Self::ExternalId => "external_id",
            Self::CreateTime => "create_time",
            Self::CloseTime => "close_time",
        }
    }

    /// Returns the column with this name, in any case.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|column| column.name().eq_ignore_ascii_case(name))
    }
}
