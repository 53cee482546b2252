"""Layer 5: the split model behind an OpenAI-compatible gateway, paid per request.

`gateway` and what lies beside it are the HTTP surface and know nothing of torch or peers. Below it are four parts:
`decoding` makes tokens over the peers that hold the stages, `upstreams` asks other people's servers, `paying` is how a
request is paid, `income` how workers check what they serve and get their part of it. Import the module that you need:
nothing heavy happens here.
"""
