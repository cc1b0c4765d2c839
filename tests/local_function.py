"""An operator under a domain of its own, so that no kernel of ONNX Runtime takes its body's place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import onnx

from xexport.core.op import Body, OpSpec

__all__ = ["under_own_domain"]

_Build = Callable[[int], onnx.FunctionProto]


def _renamed(build: _Build) -> _Build:
    def make(opset: int) -> onnx.FunctionProto:
        function = build(opset)
        function.domain = "fallback"
        return function

    return make


def under_own_domain(spec: OpSpec) -> OpSpec:
    """The same bodies in the domain ``fallback``."""
    bodies = {name: Body(_renamed(body.build), body.why) for name, body in spec.bodies.items()}
    return dataclasses.replace(spec, domain="fallback", bodies=bodies)
