"""The dashboard: pages are widgets over catalog queries; pictures and reviews go through routes of our own."""
