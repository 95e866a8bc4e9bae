// torch.ops.mole_cuda.sm90_backward: dX by the sm_90 kernels, with what the second launch of the backward
// reads. Nothing is allocated here.
#include "operands.h"

namespace mole {

using namespace sm90;

namespace {

// operands of one dX and what TMA has against them
std::string take_operands(Call& call,
                          const Tensor& dy,
                          const Tensor& weight,
                          const Tensor& down,
                          const Tensor& up,
                          const Maybe& token_weight,
                          const Tensor& dx,
                          bool alone) {
  std::string reason;
  call.x = grouped(reason, dy, "dy", alone);
  call.y = grouped(reason, dx, "dx", alone);
  call.w = matrix(weight);
  call.down = slabs(up);
  call.up = slabs(down);
  refuse_layout(reason, dy, "dy", call.x);
  refuse_layout(reason, dx, "dx", call.y);
  refuse_layout(reason, weight, "weight", call.w);
  refuse_layout(reason, up, "up", call.down);
  refuse_layout(reason, down, "down", call.up);
  if (token_weight)
    call.token_weight = matrix(*token_weight),
    refuse_layout(reason, *token_weight, "token_weight", call.token_weight);
  return reason;
}

// dX = dY·W + dh·A + dlogit·Φ [B,T,K] of one call without a sample gate, and where tensors for them are given
// dh = γ ⊙ dY·B [B,T,R] and shares of D [slices,B·T,E]; h and token_gate as the forward saved them; tile and
// slices from sm90_plan with backward. `persistent` needs dh, and d where there is a token gate. Returns why
// TMA cannot take a tensor's layout, and has done nothing then.
std::string sm90_backward(Tensor dy,
                          Tensor weight,
                          Tensor down,
                          Tensor up,
                          Tensor scale,
                          std::vector<int64_t> ranks,
                          Maybe assignment,
                          Maybe gate,
                          Maybe token_weight,
                          int64_t top_k,
                          Maybe h,
                          Maybe token_gate,
                          Tensor dx,
                          Maybe dh,
                          Maybe d,
                          Maybe flags,
                          std::string way,
                          std::vector<int64_t> tile) {
  STD_TORCH_CHECK(
      dy.is_cuda() && dy.dim() == 3 && weight.dim() == 2 && down.dim() == 3 && up.dim() == 3,
      "mole_cuda: expected dy [B,T,N] on a CUDA device, weight [N,K], down [S,R,K], up [S,N,R], got ",
      shape_of(dy), ", ", shape_of(weight), ", ", shape_of(down), ", ", shape_of(up));
  const int64_t B = dy.size(0), T = dy.size(1), N = dy.size(2), K = weight.size(1), S = down.size(0),
                R = down.size(1);
  const int64_t E = int64_t(ranks.size());
  const int device = dy.get_device();
  const ScalarType type = dy.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "mole_cuda: expected dy in bfloat16 or float16");
  STD_TORCH_CHECK(B * T > 0 && B * T < int64_t(1) << 31 && K > 0 && N > 0 && R > 0,
                  "mole_cuda: nothing to do, or too much, for dy ", shape_of(dy));
  STD_TORCH_CHECK(S > 0 && (assignment || S == 1 || S == B),
                  "mole_cuda: expected down [S,R,K] with S = 1 or B = ", B, ", got ", shape_of(down));
  STD_TORCH_CHECK(top_k >= 0 && (top_k == 0 || token_weight),
                  "mole_cuda: expected top_k = 0, or k ≥ 1 with token_weight");
  STD_TORCH_CHECK(E >= 1 && E <= MOST_EXPERTS, "mole_cuda: expected 1 to ", MOST_EXPERTS, " experts, got ",
                  E);
  STD_TORCH_CHECK(tile.size() == 4, "mole_cuda: expected tile: warp groups, columns, extra columns, cluster");
  expect(weight, "weight", {N, K}, device);
  expect(down, "down", {S, R, K}, device);
  expect(up, "up", {S, N, R}, device);
  expect(dx, "dx", {B, T, K}, device);
  if (token_weight)
    expect(*token_weight, "token_weight", {E, K}, device), expect_type(*token_weight, "token_weight", type);
  for (auto [t, name] :
       {std::pair<const Tensor*, const char*>{&weight, "weight"}, {&down, "down"}, {&up, "up"}, {&dx, "dx"}})
    expect_type(*t, name, type);

  const Way chosen = way_of(way);
  const Sizes s =
      sizes_of(B, T, K, N, R, E, S, token_weight.has_value(), false, assignment.has_value(), true);
  const std::string never = refusal(chosen, s);
  STD_TORCH_CHECK(never.empty(), "mole_cuda: ", way, " refuses: ", never);
  const Candidate c =
      consider(chosen, {int(tile[0]), int(tile[1]), int(tile[2])}, int(tile[3]), s, card_of(device));
  STD_TORCH_CHECK(c.reason.empty(), "mole_cuda: ", way, " refuses this tile: ", c.reason);

  const torch::stable::accelerator::DeviceGuard on(device);
  Call call{};
  Params& p = call.params;
  const std::string reason = take_operands(call, dy, weight, down, up, token_weight, dx, S > 1 || assignment);
  take_gates(p, scale, gate, assignment, B, T, E, device);
  take_sizes(p, s, T, S, ranks);
  p.top_k = int32_t(std::min(top_k, E));
  if (token_weight)
    p.token_gate =
        static_cast<float*>(workspace(token_gate, "token_gate", ScalarType::Float, B * T * E, device));
  if (token_weight || d) p.h = workspace(h, "h", type, B * T * R, device);
  const bool first = chosen == Way::persistent;
  if (first || dh) p.dh = workspace(dh, "dh", type, B * T * R, device);
  if ((first && token_weight) || d)
    p.d = static_cast<float*>(workspace(d, "d", ScalarType::Float, c.tile.slices * B * T * E, device));
  p.flags =
      static_cast<uint32_t*>(workspace(flags, "flags", ScalarType::Int, Rooms(c.tile, s).flags, device));
  if (!reason.empty()) return reason;
  call.bf16 = type == ScalarType::BFloat16;
  call.device = device;
  call.stream = current_stream(device);
  const std::string failed = launch(call, c.tile);
  STD_TORCH_CHECK(failed.empty(), "mole_cuda: ", way, ": ", failed);
  return "";
}

}  // namespace
}  // namespace mole

STABLE_TORCH_LIBRARY_FRAGMENT(mole_cuda, m) {
  m.def(
      "sm90_backward(Tensor dy, Tensor weight, Tensor down, Tensor up, Tensor scale, int[] ranks, Tensor? "
      "assignment, Tensor? gate, Tensor? token_weight, int top_k, Tensor? h, Tensor? token_gate, Tensor(a!) "
      "dx, Tensor(b!)? dh, Tensor(c!)? d, "
      "Tensor(d!)? flags, str way, "
      "int[] tile) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(mole_cuda, CUDA, m) { m.impl("sm90_backward", TORCH_BOX(&mole::sm90_backward)); }
