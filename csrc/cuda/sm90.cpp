// torch.ops.mole_cuda.sm90_*: the sm_90 kernels on tensors. Checks name the tensor and its shape; nothing is
// allocated here.
#include "operands.h"

namespace mole {

using namespace sm90;

namespace {

// The fastest tile for these sizes by prediction: warp groups, columns, extra columns, cluster, stages,
// shared bytes, grid, slices, floats of z, floats of shares, counters, nanoseconds; or none and the reason. K
// and N are the layer's, of dX too.  device < 0: an H200 as it is nominally
std::tuple<std::vector<int64_t>, std::string> sm90_plan(std::string way,
                                                        std::vector<int64_t> sizes,
                                                        bool token,
                                                        bool pooled,
                                                        bool assigned,
                                                        bool backward,
                                                        int64_t device) {
  STD_TORCH_CHECK(sizes.size() == 7, "mole_cuda: expected sizes B, T, K, N, R, E, S");
  const Sizes s = sizes_of(sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], token,
                           pooled, assigned, backward);
  const Candidate best = choose(way_of(way), s, device < 0 ? Card{} : card_of(int(device)));
  if (!best.reason.empty()) return {std::vector<int64_t>{}, best.reason};
  const Tile& t = best.tile;
  const Rooms rooms(t, s);
  return {
      std::vector<int64_t>{t.shape.warp_groups, t.shape.columns, t.shape.extra, t.cluster, t.stages, t.shared,
                           t.grid, t.slices, rooms.z, rooms.parts, rooms.flags, int64_t(best.us * 1000)},
      ""};
}

// all candidates, one to a line: groups columns extra cluster, then predicted microseconds or the reason why
// not
std::string sm90_candidates(std::string way, std::vector<int64_t> sizes, bool token, bool pooled) {
  STD_TORCH_CHECK(sizes.size() == 7, "mole_cuda: expected sizes B, T, K, N, R, E, S");
  const Sizes s = sizes_of(sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], token,
                           pooled, false, false);
  std::string text;
  for (const Candidate& c : candidates(way_of(way), s, Card{})) {
    text += std::to_string(c.tile.rows()) + "×" + std::to_string(c.tile.shape.columns) + "+" +
            std::to_string(c.tile.shape.extra) + " cluster " + std::to_string(c.tile.cluster) + ": " +
            (c.reason.empty() ? std::to_string(c.us) + " µs" : c.reason) + "\n";
  }
  return text;
}

// bytes of shared memory of a kernel at 2048×1280×1280, R = 64, with a token gate; -1 where it does not take
// that. way: a kernel's name, "cluster" or "cluster_dx"
int64_t sm90_shared(std::string way, std::vector<int64_t> shape) {
  STD_TORCH_CHECK(shape.size() == 3, "mole_cuda: expected warp groups, columns, extra columns");
  const size_t suffix = way.find("_dx");
  const bool back = suffix != std::string::npos;
  way = way.substr(0, suffix);
  const Way chosen = way_of(way);
  for (int cluster = 8; cluster >= 1; cluster /= 2) {
    if ((chosen == Way::cluster) != (cluster > 1)) continue;
    const Sizes s{1, 2048, 1280, 1280, 64, 2, true, false, back};
    const Candidate c = consider(chosen, {int(shape[0]), int(shape[1]), int(shape[2])}, cluster, s, Card{});
    if (c.reason.empty()) return c.tile.shared;
  }
  return -1;
}

// y (and h, l, G where tensors for them are given) of one call; tile: warp groups, columns, extra columns,
// cluster, from sm90_plan. Returns why TMA cannot take a tensor's layout, and has done nothing then; or an
// empty text.
std::string sm90_forward(Tensor x,
                         Tensor weight,
                         Maybe bias,
                         Tensor down,
                         Tensor up,
                         Tensor scale,
                         std::vector<int64_t> ranks,
                         Maybe assignment,
                         Maybe gate,
                         Maybe token_weight,
                         Maybe token_bias,
                         Maybe sample_weight,
                         Maybe sample_bias,
                         int64_t top_k,
                         Tensor y,
                         Maybe h,
                         Maybe token_gate,
                         Maybe sample_gate,
                         Maybe z,
                         Maybe parts,
                         Maybe flags,
                         std::string way,
                         std::vector<int64_t> tile) {
  STD_TORCH_CHECK(
      x.is_cuda() && x.dim() == 3 && weight.dim() == 2 && down.dim() == 3 && up.dim() == 3,
      "mole_cuda: expected x [B,T,K] on a CUDA device, weight [N,K], down [S,R,K], up [S,N,R], got ",
      shape_of(x), ", ", shape_of(weight), ", ", shape_of(down), ", ", shape_of(up));
  const int64_t B = x.size(0), T = x.size(1), K = x.size(2), N = weight.size(0), S = down.size(0),
                R = down.size(1);
  const int64_t E = int64_t(ranks.size());
  const int device = x.get_device();
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "mole_cuda: expected x in bfloat16 or float16");
  STD_TORCH_CHECK(B * T > 0 && B * T < int64_t(1) << 31 && K > 0 && N > 0 && R > 0,
                  "mole_cuda: nothing to do, or too much, for x ", shape_of(x));
  STD_TORCH_CHECK(assignment || S == 1 || S == B, "mole_cuda: expected down [S,R,K] with S = 1 or B = ", B,
                  ", got ", shape_of(down));
  STD_TORCH_CHECK(S > 0 && top_k >= 0 && (top_k == 0 || token_weight),
                  "mole_cuda: expected top_k = 0, or k ≥ 1 with token_weight, and at least one set");
  STD_TORCH_CHECK(E >= 1 && E <= MOST_EXPERTS, "mole_cuda: expected 1 to ", MOST_EXPERTS, " experts, got ",
                  E);
  STD_TORCH_CHECK(tile.size() == 4, "mole_cuda: expected tile: warp groups, columns, extra columns, cluster");
  expect(weight, "weight", {N, K}, device);
  expect(down, "down", {S, R, K}, device);
  expect(up, "up", {S, N, R}, device);
  expect(y, "y", {B, T, N}, device);
  for (auto [t, name] :
       {std::pair<const Tensor*, const char*>{&weight, "weight"}, {&down, "down"}, {&up, "up"}, {&y, "y"}})
    expect_type(*t, name, type);

  const Sizes s = sizes_of(B, T, K, N, R, E, S, token_weight.has_value(), sample_weight.has_value(),
                           assignment.has_value(), false);
  const Way chosen = way_of(way);
  const std::string never = refusal(chosen, s);
  STD_TORCH_CHECK(never.empty(), "mole_cuda: ", way, " refuses: ", never);
  const Candidate c =
      consider(chosen, {int(tile[0]), int(tile[1]), int(tile[2])}, int(tile[3]), s, card_of(device));
  STD_TORCH_CHECK(c.reason.empty(), "mole_cuda: ", way, " refuses this tile: ", c.reason);
  const Rooms rooms(c.tile, s);

  const torch::stable::accelerator::DeviceGuard on(device);
  Call call{};
  Params& p = call.params;
  const bool alone = S > 1 || sample_weight.has_value() || assignment.has_value();
  std::string reason;
  call.x = grouped(reason, x, "x", alone);
  call.y = grouped(reason, y, "y", alone);
  call.w = matrix(weight);
  call.down = slabs(down);
  call.up = slabs(up);
  refuse_layout(reason, x, "x", call.x);
  refuse_layout(reason, y, "y", call.y);
  refuse_layout(reason, weight, "weight", call.w);
  refuse_layout(reason, down, "down", call.down);
  refuse_layout(reason, up, "up", call.up);
  if (bias) {
    expect(*bias, "bias", {N}, device);
    expect_type(*bias, "bias", type);
    STD_TORCH_CHECK(bias->is_contiguous(), "mole_cuda: expected a contiguous bias");
    p.bias = bias->data_ptr();
    if (reinterpret_cast<uint64_t>(p.bias) % 4) reason = "bias does not begin at a multiple of 4 bytes";
  }
  if (token_weight) {
    expect(*token_weight, "token_weight", {E, K}, device);
    expect_type(*token_weight, "token_weight", type);
    call.token_weight = matrix(*token_weight);
    refuse_layout(reason, *token_weight, "token_weight", call.token_weight);
    STD_TORCH_CHECK(token_gate, "mole_cuda: expected token_gate to be filled");
    expect(*token_gate, "token_gate", {B, T, E}, device);
    p.token_gate =
        static_cast<float*>(workspace(token_gate, "token_gate", ScalarType::Float, B * T * E, device));
  }
  const std::tuple<const Maybe*, const char*, int64_t> vectors[] = {{&token_bias, "token_bias", E},
                                                                    {&sample_bias, "sample_bias", E}};
  for (auto [t, name, size] : vectors) {
    if (!*t) continue;
    expect(**t, name, {size}, device);
    STD_TORCH_CHECK((*t)->is_contiguous(), "mole_cuda: expected a contiguous ", name);
  }
  take_gates(p, scale, gate, assignment, B, T, E, device);
  p.token_bias = numbers(token_bias, "token_bias");
  p.sample_bias = numbers(sample_bias, "sample_bias");
  p.sample_weight = numbers(sample_weight, "sample_weight");
  if (sample_weight) {
    expect(*sample_weight, "sample_weight", {S, R}, device);
    STD_TORCH_CHECK(sample_weight->is_contiguous(), "mole_cuda: expected a contiguous sample_weight");
    p.pool_set = R;
    STD_TORCH_CHECK(sample_gate, "mole_cuda: expected sample_gate to be filled");
    expect(*sample_gate, "sample_gate", {B, E}, device);
    p.sample_gate =
        static_cast<float*>(workspace(sample_gate, "sample_gate", ScalarType::Float, B * E, device));
  }
  p.top_k = int32_t(std::min(top_k, E));
  if (h) {
    expect(*h, "h", {B, T, R}, device);
    p.h = workspace(h, "h", type, B * T * R, device);
    p.save = 1;
  }
  if (!reason.empty()) return reason;
  p.z = static_cast<float*>(workspace(z, "z", ScalarType::Float, rooms.z, device));
  p.parts = static_cast<float*>(workspace(parts, "parts", ScalarType::Float, rooms.parts, device));
  p.flags = static_cast<uint32_t*>(workspace(flags, "flags", ScalarType::Int, rooms.flags, device));
  take_sizes(p, s, T, S, ranks);
  call.bf16 = type == ScalarType::BFloat16;
  call.device = device;
  call.stream = current_stream(device);
  const std::string failed = launch(call, c.tile);
  // a driver that does not launch clusters cooperatively, or has no room for all of them now, refuses:
  // another way may do
  if (!failed.empty() && chosen == Way::cluster && p.pooled) return failed;
  STD_TORCH_CHECK(failed.empty(), "mole_cuda: ", way, ": ", failed);
  return "";
}

// y [M,N] = x [M,K] weightᵀ by a step of the ladder, from step 3 with bias; step 4 adds z [M,R] · up [N,R]ᵀ
void sm90_ladder(
    Tensor x, Tensor weight, Maybe bias, Maybe z, Maybe up, Tensor y, int64_t step, int64_t columns) {
  STD_TORCH_CHECK(x.is_cuda() && x.dim() == 2 && weight.dim() == 2,
                  "mole_cuda: expected x [M,K] on a CUDA device and weight [N,K], got ", shape_of(x), ", ",
                  shape_of(weight));
  const int64_t M = x.size(0), K = x.size(1), N = weight.size(0);
  const int device = x.get_device();
  STD_TORCH_CHECK(M > 0 && M < int64_t(1) << 31 && K > 0 && N > 0 && N % 8 == 0,
                  "mole_cuda: expected M, K ≥ 1 and N a multiple of 8");
  expect(weight, "weight", {N, K}, device);
  expect(y, "y", {M, N}, device);
  STD_TORCH_CHECK(y.is_contiguous(), "mole_cuda: expected a contiguous y");
  STD_TORCH_CHECK((step == 4) == z.has_value() && z.has_value() == up.has_value() && (step >= 3 || !bias),
                  "mole_cuda: the ladder takes z and up at step 4, a bias from step 3 on");
  const torch::stable::accelerator::DeviceGuard on(device);
  Call call{};
  call.x = matrix(x), call.w = matrix(weight), call.y = matrix(y);
  std::vector<std::tuple<const Tensor*, const char*, Operand*>> all{
      {&x, "x", &call.x}, {&weight, "weight", &call.w}, {&y, "y", &call.y}};
  if (z) {
    expect(*z, "z", {M, z->size(1)}, device);
    expect(*up, "up", {N, z->size(1)}, device);
    call.down = matrix(*z), call.up = matrix(*up), call.params.R = int32_t(z->size(1));
    all.push_back({&*z, "z", &call.down}), all.push_back({&*up, "up", &call.up});
  }
  for (auto [t, name, operand] : all) {
    expect_type(*t, name, ScalarType::BFloat16);
    std::string reason;
    refuse_layout(reason, *t, name, *operand);
    STD_TORCH_CHECK(reason.empty(), "mole_cuda: ladder: ", reason);
  }
  if (bias) {
    expect(*bias, "bias", {N}, device);
    expect_type(*bias, "bias", ScalarType::BFloat16);
    STD_TORCH_CHECK(bias->is_contiguous(), "mole_cuda: expected a contiguous bias");
    call.params.bias = bias->data_ptr();
  }
  call.params.N = int32_t(N), call.params.K = int32_t(K), call.params.span = int32_t(M),
  call.params.h = y.data_ptr();
  call.bf16 = true, call.device = device, call.stream = current_stream(device);
  const std::string failed = launch_ladder(int(step), call, int(columns));
  STD_TORCH_CHECK(failed.empty(), "mole_cuda: ladder: ", failed);
}

}  // namespace
}  // namespace mole

STABLE_TORCH_LIBRARY_FRAGMENT(mole_cuda, m) {
  m.def(
      "sm90_plan(str way, int[] sizes, bool token, bool pooled, bool assigned, bool backward, int device) -> "
      "(int[], str)");
  m.def("sm90_candidates(str way, int[] sizes, bool token, bool pooled) -> str");
  m.def("sm90_shared(str way, int[] shape) -> int");
  m.def(
      "sm90_ladder(Tensor x, Tensor weight, Tensor? bias, Tensor? z, Tensor? up, Tensor(a!) y, int step, int "
      "columns) -> ()");
  m.def(
      "sm90_forward(Tensor x, Tensor weight, Tensor? bias, Tensor down, Tensor up, Tensor scale, int[] "
      "ranks, Tensor? assignment, Tensor? gate, Tensor? token_weight, Tensor? token_bias, "
      "Tensor? sample_weight, Tensor? sample_bias, int top_k, Tensor(a!) y, "
      "Tensor(b!)? h, Tensor(c!)? token_gate, Tensor(d!)? sample_gate, "
      "Tensor(e!)? z, Tensor(f!)? parts, Tensor(g!)? flags, str way, int[] tile) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(mole_cuda, CompositeExplicitAutograd, m) {
  m.impl("sm90_plan", TORCH_BOX(&mole::sm90_plan));
  m.impl("sm90_candidates", TORCH_BOX(&mole::sm90_candidates));
  m.impl("sm90_shared", TORCH_BOX(&mole::sm90_shared));
}

STABLE_TORCH_LIBRARY_IMPL(mole_cuda, CUDA, m) {
  m.impl("sm90_forward", TORCH_BOX(&mole::sm90_forward));
  m.impl("sm90_ladder", TORCH_BOX(&mole::sm90_ladder));
}
