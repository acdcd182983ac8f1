"""Proof that two programs compute the same; knows no norms."""

from normswap.verification.compare import verify
from normswap.verification.inputs import load_inputs
from normswap.verification.result import Layer, Location, Profile, Verification

__all__ = ["Layer", "Location", "Profile", "Verification", "load_inputs", "verify"]
