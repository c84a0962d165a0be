"""Frontend 1: traced values, argument trees and scopes."""
