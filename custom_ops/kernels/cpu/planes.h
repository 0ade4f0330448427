// Copyright 2026 The keras_sparse Authors. Licensed under the Apache License, Version 2.0.
//
// Tiles of an NHWC tensor as zero-padded planes, one per channel, and how a batch is cut into them.
//
// A tile holds `tile_rows` grid rows of `images` images. The images of a tile stand side by side in
// one long row, so that vectors stay full when images are small; neighbours share the zero columns
// between them. With a horizontal stride the columns are sorted by phase (column mod stride): every
// load of neighbouring grid columns is then contiguous:
//
//   plane of channel c, phase f, row r, column t of image g:
//     c * channel_size + f * phase_size + r * row_length + g * pitch + t
//   holds padded column t * step_width + f, i.e. image column t * step_width + f - pad_left.

#ifndef KERAS_SPARSE_CUSTOM_OPS_KERNELS_CPU_PLANES_H_
#define KERAS_SPARSE_CUSTOM_OPS_KERNELS_CPU_PLANES_H_

#include "custom_ops/kernels/conv2d.h"
#include "custom_ops/kernels/cpu/vector.h"

namespace ks {
namespace KS_ISA {

// An NHWC source seen from a grid of positions: grid position (y, x) reads padded pixels
// (y * step_height .. + reach_height, x * step_width .. + reach_width).
struct Grid {
  int64_t batch, height, width, channels;  // Of the source.
  int64_t rows, columns;                   // Of the grid.
  int64_t step_height, step_width;
  int64_t reach_height, reach_width;
  int64_t pad_top, pad_left;  // Of the source; negative when its first pixels are never read.
};

struct Planes {
  int64_t images, tile_rows;  // Of a tile.
  int64_t groups, row_tiles;  // Tiles = groups of images x row tiles.
  int64_t pitch;              // Columns from one image to the next.
  int64_t columns;            // Grid columns of a full tile, those between images included.
  int64_t phases;
  int64_t source_width;  // Padded columns of an image that are kept.
  int64_t row_length, phase_size, channel_size;
};

// The input as the pixels of the output see it.
KS_INLINE Grid ForwardGrid(const KsGeometry& geometry) {
  return {geometry.batch,
          geometry.in_height,
          geometry.in_width,
          geometry.in_channels,
          geometry.out_height,
          geometry.out_width,
          geometry.stride_height,
          geometry.stride_width,
          (geometry.kernel_height - 1) * geometry.dilation_height,
          (geometry.kernel_width - 1) * geometry.dilation_width,
          geometry.pad_top,
          geometry.pad_left};
}

// One-tap convolutions with stride 1 and no padding see pixels, not images.
KS_INLINE bool IsPointwise(const KsGeometry& geometry) {
  return geometry.kernel_height == 1 && geometry.kernel_width == 1 && geometry.stride_height == 1 &&
         geometry.stride_width == 1 && geometry.pad_top == 0 && geometry.pad_left == 0 &&
         geometry.in_height == geometry.out_height && geometry.in_width == geometry.out_width;
}

// Turns a grid into that of batch * height * width images of one pixel.
KS_INLINE void MakePointwise(Grid* grid) {
  grid->batch *= grid->height * grid->width;
  grid->height = grid->width = 1;
  grid->rows = grid->columns = 1;
}

constexpr int64_t kCacheBudget = 512 * 1024;          // Bytes of planes worked on at a time.
constexpr int64_t kScratchLimit = 256 * 1024 * 1024;  // Above, a routine declines.
constexpr int64_t kWantedItems = 16;                  // Independent pieces of work, if possible.

// The sizes of planes with `rows` rows. Planes of different channels are an odd number of cache
// lines apart.
KS_INLINE void SizePlanes(int64_t row_length, int64_t rows, Planes* planes) {
  planes->row_length = row_length;
  planes->phase_size = row_length * rows;
  planes->channel_size = OddLines(planes->phase_size * planes->phases);
}

KS_INLINE void LayoutPlanes(const Grid& grid, int64_t images, int64_t tile_rows, Planes* planes) {
  planes->images = images;
  planes->tile_rows = tile_rows;
  planes->groups = CeilDiv(grid.batch, images);
  planes->row_tiles = CeilDiv(grid.rows, tile_rows);
  planes->phases = grid.step_width;
  planes->source_width = (grid.columns - 1) * grid.step_width + grid.reach_width + 1;
  const int64_t used = Max(0, Min(grid.width, planes->source_width - grid.pad_left));
  planes->pitch =
      Max(grid.columns, CeilDiv(planes->source_width - Max(0, grid.pad_left), grid.step_width));
  planes->pitch = Max(planes->pitch, CeilDiv(grid.pad_left + used, grid.step_width));
  planes->columns = (images - 1) * planes->pitch + grid.columns;
  const int64_t read = RoundUp(planes->columns, kLanes) + grid.reach_width / grid.step_width;
  const int64_t written =
      (images - 1) * planes->pitch + CeilDiv(planes->source_width, grid.step_width);
  SizePlanes(RoundUp(Max(read, written), 16),
             (tile_rows - 1) * grid.step_height + grid.reach_height + 1, planes);
}

// Where tap (i, j) reads, relative to the plane position of a grid position.
KS_INLINE int64_t TapOffset(const KsGeometry& geometry, const Planes& planes, int64_t i,
                            int64_t j) {
  const int64_t column = j * geometry.dilation_width;
  return i * geometry.dilation_height * planes.row_length +
         column % planes.phases * planes.phase_size + column / planes.phases;
}

KS_INLINE int64_t PlanesBytes(const Planes& planes, int64_t channels) {
  return planes.channel_size * channels * 4;
}

// Chooses the tile for planes of `channels` channels in all. Returns false when even the smallest
// tile takes too much memory. tile_overhead is what a plane costs beyond its vectors, in vectors.
// Depends on sizes only.
KS_INLINE bool PlanPlanes(const Grid& grid, int64_t channels, int64_t tile_overhead,
                          Planes* planes) {
  const double smallest =
      4.0 * static_cast<double>(channels + 1) * (static_cast<double>(grid.reach_height) + 1.0) *
      (static_cast<double>(grid.columns) * static_cast<double>(grid.step_width) +
       static_cast<double>(grid.reach_width) + 64.0 * grid.step_width);
  if (smallest > static_cast<double>(kScratchLimit) / 8) return false;
  if (grid.batch <= 0 || grid.rows <= 0 || grid.columns <= 0) return false;

  int64_t rows = grid.rows;
  LayoutPlanes(grid, 1, rows, planes);
  while (rows > 4 && PlanesBytes(*planes, channels) > kCacheBudget) {
    rows = Max(4, rows * 3 / 4);
    LayoutPlanes(grid, 1, rows, planes);
  }
  while (rows > 1 && PlanesBytes(*planes, channels) > kScratchLimit / 4) {
    rows /= 2;
    LayoutPlanes(grid, 1, rows, planes);
  }
  if (PlanesBytes(*planes, channels) > kScratchLimit / 2) return false;
  // The smallest group of images that keeps the lanes about as full as any group does, and that has
  // enough vectors to hide the latency of their sums. Lower tiles make room for larger groups, but
  // read more rows twice.
  const int64_t least_tiles = planes->row_tiles;
  const int64_t most_images = Min(grid.batch, Max(16, 1024 / Max(1, grid.columns)));
  int64_t best_rows = CeilDiv(grid.rows, least_tiles);
  int64_t best_images = 1;
  double best = 0;
  for (int64_t tiles = least_tiles; tiles <= 4 * least_tiles; tiles *= 2) {
    rows = CeilDiv(grid.rows, tiles);
    if (tiles > least_tiles && rows < 4) break;
    const double own = static_cast<double>(rows * grid.step_height);
    const double rows_once = own / (own + static_cast<double>(grid.reach_height) / 3);
    for (int64_t images = 1; images <= most_images; ++images) {
      Planes candidate;
      LayoutPlanes(grid, images, rows, &candidate);
      if (images > 1 && PlanesBytes(candidate, channels) > kCacheBudget) break;
      if (candidate.groups * candidate.row_tiles < kWantedItems && best > 0.75) break;
      const int64_t lanes = RoundUp(candidate.columns, kLanes);
      const double vectors = static_cast<double>(lanes / kLanes * rows);
      const double full = static_cast<double>(grid.columns * images) / static_cast<double>(lanes) *
                          (vectors < 16 ? vectors / 16 : 1.0) * rows_once * vectors /
                          (vectors + static_cast<double>(tile_overhead));
      if (full > best * 1.04) {
        best = full;
        best_rows = rows;
        best_images = images;
      }
    }
  }
  LayoutPlanes(grid, best_images, best_rows, planes);
  return true;
}

// Moves `count` pixels of `channels` channels, pixel_stride floats apart, to rows of planes. `room`
// is how many floats of a row, from `plane` on, may be overwritten (with zeros after `count`).
KS_INLINE void PackRun(const float* pixels, int64_t pixel_stride, int64_t count, int64_t channels,
                       float* plane, int64_t channel_size, int64_t room) {
  if (channels < kLanes) {
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t p = 0; p < count; ++p)
        plane[c * channel_size + p] = pixels[p * pixel_stride + c];
    }
    return;
  }
  for (int64_t p = 0; p < count; p += kLanes) {
    const int64_t here = Min(kLanes, count - p);
    const float* source = pixels + p * pixel_stride;
    Vec rows[kLanes];
    if (here == kLanes) {
      KS_UNROLL
      for (int i = 0; i < kLanes; ++i) rows[i] = Load(source + i * pixel_stride);
    } else {
      KS_UNROLL
      for (int i = 0; i < kLanes; ++i) {
        rows[i] = i < here ? Load(source + i * pixel_stride) : Vec{};
      }
    }
    Transpose(rows);
    if (room - p >= kLanes) {
      KS_UNROLL
      for (int i = 0; i < kLanes; ++i) Store(plane + i * channel_size + p, rows[i]);
    } else {
      for (int i = 0; i < kLanes; ++i) StoreFirst(plane + i * channel_size + p, rows[i], here);
    }
  }
}

// The reverse: rows of planes to pixels.
KS_INLINE void UnpackRun(const float* plane, int64_t channel_size, int64_t count, int64_t channels,
                         float* pixels, int64_t pixel_stride) {
  if (channels < kLanes) {
    for (int64_t p = 0; p < count; ++p) {
      for (int64_t c = 0; c < channels; ++c)
        pixels[p * pixel_stride + c] = plane[c * channel_size + p];
    }
    return;
  }
  for (int64_t p = 0; p < count; p += kLanes) {
    const int64_t here = Min(kLanes, count - p);
    Vec rows[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const float* row = plane + i * channel_size + p;
      if (here == kLanes) {
        rows[i] = Load(row);
      } else {
        float lanes[kLanes] = {};
        for (int64_t l = 0; l < here; ++l) lanes[l] = row[l];
        rows[i] = Load(lanes);
      }
    }
    Transpose(rows);
    float* target = pixels + p * pixel_stride;
    if (here == kLanes) {
      KS_UNROLL
      for (int i = 0; i < kLanes; ++i) Store(target + i * pixel_stride, rows[i]);
    } else {
      for (int64_t i = 0; i < here; ++i) Store(target + i * pixel_stride, rows[i]);
    }
  }
}

// The columns t of phase f that hold image columns: [*begin, *end).
KS_INLINE void PhaseColumns(const Grid& grid, const Planes& planes, int64_t phase, int64_t* begin,
                            int64_t* end) {
  const int64_t used = Max(0, Min(grid.width, planes.source_width - grid.pad_left));
  *begin = Max(0, CeilDiv(grid.pad_left - phase, grid.step_width));
  *end = Max(*begin, CeilDiv(grid.pad_left + used - phase, grid.step_width));
}

// Fills the planes of channels [channel_begin, channel_end) of one tile. `planes_data` is the plane
// of channel_begin. Plane row 0 is padded source row first_row; `rows` rows are filled, and images
// past the end of the batch are zero.
KS_INLINE void PackPlanes(const Grid& grid, const Planes& planes, const float* source,
                          int64_t channel_begin, int64_t channel_end, int64_t first_image,
                          int64_t first_row, int64_t rows, float* planes_data) {
  const int64_t channels = channel_end - channel_begin;
  const int64_t images = Min(planes.images, grid.batch - first_image);
  const int64_t image_size = grid.height * grid.width * grid.channels;
  // One-pixel-high images that touch each other are one long image.
  const bool merge =
      grid.height == 1 && grid.step_width == 1 && grid.pad_left == 0 && planes.pitch == grid.width;
  // Blocks of kLanes channels; the last one overlaps the one before rather than being partial.
  for (int64_t c = 0; c < channels; c += kLanes) {
    const int64_t first = channels >= kLanes ? Min(c, channels - kLanes) : 0;
    const int64_t block = Min(kLanes, channels);
    float* block_data = planes_data + first * planes.channel_size;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t b = 0; b < block; ++b) {
        for (int64_t f = 0; f < planes.phases; ++f) {
          memset(
              block_data + b * planes.channel_size + f * planes.phase_size + r * planes.row_length,
              0, planes.row_length * 4);
        }
      }
      const int64_t y = first_row + r - grid.pad_top;
      if (y < 0 || y >= grid.height) continue;
      const float* row = source + first_image * image_size + y * grid.width * grid.channels +
                         channel_begin + first;
      for (int64_t f = 0; f < planes.phases; ++f) {
        float* target = block_data + f * planes.phase_size + r * planes.row_length;
        if (merge) {
          PackRun(row, grid.channels, images * grid.width, block, target, planes.channel_size,
                  planes.row_length);
          continue;
        }
        int64_t begin, end;
        PhaseColumns(grid, planes, f, &begin, &end);
        if (begin == end) continue;
        const float* pixels = row + (begin * grid.step_width + f - grid.pad_left) * grid.channels;
        for (int64_t g = 0; g < images; ++g) {
          const int64_t at = g * planes.pitch + begin;
          PackRun(pixels + g * image_size, grid.step_width * grid.channels, end - begin, block,
                  target + at, planes.channel_size, planes.row_length - at);
        }
      }
    }
  }
}

// Memory is taken from a block in order, each piece aligned to KS_ALIGNMENT.
struct Arena {
  char* at;
  template <typename T>
  T* Take(int64_t count) {
    T* piece = reinterpret_cast<T*>(at);
    at += RoundUp(count * static_cast<int64_t>(sizeof(T)), KS_ALIGNMENT);
    return piece;
  }
};
KS_INLINE int64_t PieceBytes(int64_t count, int64_t size) {
  return RoundUp(count * size, KS_ALIGNMENT);
}

// A routine keeps what its plan decided in the plan's parameters.
template <typename T>
KS_INLINE void SaveParameters(const T& parameters, KsPlan* plan) {
  static_assert(sizeof(T) <= sizeof(plan->parameters), "Raise KS_PLAN_PARAMETERS.");
  memcpy(plan->parameters, &parameters, sizeof(T));
}
template <typename T>
KS_INLINE T LoadParameters(const KsPlan* plan) {
  T parameters;
  memcpy(&parameters, plan->parameters, sizeof(T));
  return parameters;
}

}  // namespace KS_ISA
}  // namespace ks

#endif  // KERAS_SPARSE_CUSTOM_OPS_KERNELS_CPU_PLANES_H_
