"""One script per table or figure; results/ holds what they measured."""
